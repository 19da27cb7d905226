"""The `evaluation` section."""

from pydantic import Field

from pretrain.config.section import Count, CountOrZero, Section


class EvaluationConfig(Section):
    """Frequency of validation and probes.

    A probe freezes the encoder and measures its features: k-NN and linear top-1 accuracy (with labels) and effective
    rank. It also saves pictures of CLS attention and, for a masked autoencoder, of reconstructed images.
    """

    every_steps: CountOrZero = Field(0, description="Steps between validations; 0 validates only at the end.")
    probe_every_steps: CountOrZero = Field(0, description="Steps between probes, with one at the end; 0 disables them.")
    probe_samples: Count = Field(
        10_000,
        description="Number of training images used to fit the k-NN and linear probes, sampled evenly from the set.",
    )
