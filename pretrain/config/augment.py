"""The `augment` section, inside `objective` in pretraining: random changes to training images."""

from collections.abc import Iterator

from pydantic import Field

from pretrain.config.section import (
    CountOrZero,
    Fraction,
    NonNegative,
    Positive,
    Problem,
    Section,
    range_problems,
)

MAX_HUE = 0.5
MAX_MAGNITUDE = 10


class AugmentConfig(Section):
    """Augmentation of training images. Random parameters depend only on the seed, the epoch and the sample."""

    crop_scale: tuple[Fraction, Fraction] = Field(
        (0.08, 1.0), description="Smallest and largest fraction of the image's area that a random crop keeps."
    )
    crop_aspect: tuple[Positive, Positive] = Field(
        (3 / 4, 4 / 3), description="Smallest and largest width-to-height ratio of a random crop."
    )
    flip: Fraction = Field(0.5, description="Probability of a horizontal flip; 0 if left and right differ in meaning.")
    brightness: NonNegative = Field(0.0, description="Largest relative change of brightness; 0 disables it.")
    contrast: NonNegative = Field(0.0, description="Largest relative change of contrast; 0 disables it.")
    saturation: NonNegative = Field(0.0, description="Largest relative change of saturation; 0 disables it.")
    hue: NonNegative = Field(0.0, description="Largest shift of the hue in turns of the color circle, from 0 to 0.5.")
    three_augment: bool = Field(
        False,
        description="Whether each image gets exactly one of grayscale, solarize and blur (arXiv 2204.07118).",
    )
    grayscale: Fraction = Field(0.0, description="Probability of converting an image to grayscale.")
    solarize: Fraction = Field(0.0, description="Probability of inverting all values above 0.5 (arXiv 2006.07733).")
    blur: Fraction = Field(0.0, description="Probability of a Gaussian blur.")
    blur_sigma: tuple[Positive, Positive] = Field(
        (0.1, 2.0), description="Smallest and largest sigma of the blur, in pixels of the model's input."
    )
    rand_augment_ops: CountOrZero = Field(
        0, description="Number of RandAugment operations per image (arXiv 1909.13719); 0 disables RandAugment."
    )
    rand_augment_magnitude: NonNegative = Field(9.0, description="Strength of RandAugment's operations, from 0 to 10.")
    erasing: Fraction = Field(0.0, description="Probability of erasing a random rectangle (arXiv 1708.04896).")
    mixup: NonNegative = Field(
        0.0, description="Alpha of mixup's Beta distribution (arXiv 1710.09412); 0 disables mixup."
    )
    cutmix: NonNegative = Field(
        0.0, description="Alpha of CutMix's Beta distribution (arXiv 1905.04899); 0 disables CutMix."
    )

    @property
    def mixes(self) -> bool:
        """Whether mixup or CutMix combines each image with its neighbor in the batch."""
        return self.mixup > 0 or self.cutmix > 0

    def problems(self) -> Iterator[Problem]:
        yield from range_problems(self, "crop_scale", "crop_aspect", "blur_sigma")
        if self.three_augment and (self.grayscale or self.solarize or self.blur):
            sentence = "already applies grayscale, solarize or blur; set these three to 0"
            yield Problem(("three_augment", "grayscale", "solarize", "blur"), sentence)
        if self.hue > MAX_HUE:
            yield Problem(("hue",), f"must be at most {MAX_HUE} (half the color circle), got {self.hue}; lower it")
        if self.rand_augment_magnitude > MAX_MAGNITUDE:
            yield Problem(
                ("rand_augment_magnitude",),
                f"must be from 0 to {MAX_MAGNITUDE}, got {self.rand_augment_magnitude}; lower it",
            )
