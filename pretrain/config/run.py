"""The whole pretraining run on one page: typed, strict, validated once, before torch is imported.

Sizes carry Hugging Face's names. Each room is given its own section, never the whole.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import Self

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
Location = Annotated[str, AfterValidator(lambda name: str(Path(name).expanduser()) if name[:1] == "~" else name)]


class Problem(NamedTuple):
    """Values that are impossible together: the keys involved, the one to change first, and a sentence."""

    keys: tuple[str, ...]
    sentence: str


class Section(BaseModel):
    """Base of every section: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def problems(self) -> Iterator[Problem]:
        """Yield what no single field can see: values that are impossible together."""
        yield from ()

    @model_validator(mode="after")
    def _raise_problems(self) -> Self:
        details = [
            InitErrorDetails(
                type=PydanticCustomError("impossible", "{sentence}", {"sentence": sentence, "keys": keys}),
                loc=tuple(keys[0].split(".")),
                input=None,
            )
            for keys, sentence in self.problems()
        ]
        if details:
            raise ValidationError.from_exception_data(type(self).__name__, details)
        return self


class FaultBudget(Section):
    """How much of the data may be unusable; each such sample is replaced and named in quarantine.jsonl."""

    max_bad_fraction: Fraction = Field(0.01, description="share of unusable samples above which the run stops")
    max_bad_consecutive: Count = Field(100, description="unusable samples in a row above which the run stops")


class SourceConfig(FaultBudget):
    """Where data comes from: paths, or URLs (http, s3, gs, hf) whose shards are kept on each machine's disk."""

    train: Location | list[Location]
    num_workers: CountOrZero = Field(4, description="processes of each rank that read, decode and crop")
    num_threads: Count = Field(1, description="of each worker, in training; more help where a disk answers slowly")
    cache_dir: UserPath = Field(Path("~/.cache/vitrail").expanduser(), description="on each machine's own disk")
    cache_bytes: Count = Field(100_000_000_000, description="limit of the cache, over all runs that share it")
    stall_seconds: Positive = Field(60.0, description="a host that sends nothing for so long ends the run")
    allow_pipe: bool = Field(False, description="whether a shard may be a command, as in pipe:COMMAND")


class DataConfig(SourceConfig):
    """Shard sets written by `vitrail shards make` or indexed by `vitrail shards index`."""

    weights: list[Positive] | None = Field(
        None, description="how often each of several sets is drawn; without it they are one set"
    )
    validation: Location | None = None
    decode: Literal["cpu", "gpu"] = Field(
        "cpu", description="where training's JPEGs are decoded; gpu needs the extra [gpu-decode]"
    )
    shuffle_window: Count = Field(64, description="shards whose samples are shuffled together")
    repeats: Count = Field(1, description="views of each image in a global batch (arXiv 1901.09335)")

    def problems(self) -> Iterator[Problem]:
        sets = len(self.train) if isinstance(self.train, list) else 1
        if self.weights is not None and len(self.weights) != sets:
            yield Problem(
                ("weights", "train"), f"{len(self.weights)} weights for {sets} sets of train; expected one for each"
            )


class ModelConfig(Section):
    """A plain pre-norm ViT (arXiv 2010.11929). The defaults are ViT-B/16 at 224 pixels."""

    hidden_size: Count = 768
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    mlp_ratio: Positive | None = None
    intermediate_size: Count | None = Field(None, description="width of the MLP; mlp_ratio x hidden_size when absent")
    patch_size: Count = 16
    image_size: Count = 224
    num_channels: Literal[3] = 3
    position_embedding: Literal["learned", "sincos"] = "learned"
    dropout: Rate = 0.0
    attention_dropout: Rate = 0.0
    drop_path: Rate = Field(0.0, description="rate of the last block; grows linearly from 0 at the first")
    layer_scale: NonNegative = Field(
        0.0, description="first value of a factor for each channel of a branch, 0: none (arXiv 2103.17239)"
    )
    layer_norm_eps: Positive = 1e-6

    @property
    def mlp_size(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.intermediate_size or int(self.hidden_size * (self.mlp_ratio or 4.0))

    @property
    def num_patches(self) -> int:
        """Patches in an image."""
        return (self.image_size // self.patch_size) ** 2

    def problems(self) -> Iterator[Problem]:
        if self.image_size % self.patch_size:
            below = max(self.image_size - self.image_size % self.patch_size, self.patch_size)
            yield Problem(
                ("patch_size", "image_size"),
                f"patches of {self.patch_size} pixels don't divide an image of {self.image_size}; "
                f"image_size={below} would fit",
            )
        if self.hidden_size % self.num_attention_heads:
            yield Problem(
                ("num_attention_heads", "hidden_size"),
                f"{self.num_attention_heads} heads don't divide hidden_size {self.hidden_size}; "
                f"{_divisor_near(self.hidden_size, self.num_attention_heads)} would",
            )
        if self.position_embedding == "sincos" and self.hidden_size % 4:
            yield Problem(
                ("hidden_size", "position_embedding"), f"sincos positions need a multiple of 4, got {self.hidden_size}"
            )
        if self.intermediate_size is not None and self.mlp_ratio is not None:
            yield Problem(
                ("mlp_ratio", "intermediate_size"),
                "intermediate_size already sets the MLP's width; keep one of the two",
            )
        if self.mlp_size < 1:
            yield Problem(("mlp_ratio", "hidden_size"), f"an MLP of {self.mlp_ratio} x {self.hidden_size} has no width")


class PreprocessingConfig(Section):
    """What the exported image processor does to an image; the validation set is seen the same way."""

    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    resize_ratio: Annotated[float, Field(ge=1)] = Field(
        1.0, description="the shorter edge becomes this times image_size, then the center is cropped"
    )


class AugmentConfig(Section):
    """What training does to an image. Every draw is keyed by (seed, epoch, sample)."""

    crop_scale: tuple[Fraction, Fraction] = Field(
        (0.08, 1.0), description="share of the image's area that a crop keeps"
    )
    crop_aspect: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    flip: Fraction = 0.5
    brightness: NonNegative = 0.0
    contrast: NonNegative = 0.0
    saturation: NonNegative = 0.0
    hue: NonNegative = Field(0.0, description="largest shift of the hue, in turns of its circle")
    three_augment: bool = Field(
        False,
        description="one of grayscale, solarize and blur for each image, and nothing else of them (arXiv 2204.07118)",
    )
    grayscale: Fraction = Field(0.0, description="probability of losing the color")
    solarize: Fraction = Field(0.0, description="probability of inverting the brighter half (arXiv 2006.07733)")
    blur: Fraction = Field(0.0, description="probability of a Gaussian blur")
    blur_sigma: tuple[Positive, Positive] = Field((0.1, 2.0), description="of the blur, in pixels of the model's input")
    rand_augment_ops: CountOrZero = Field(0, description="operations of RandAugment (arXiv 1909.13719) on each sample")
    rand_augment_magnitude: NonNegative = Field(9.0, description="how far each of them goes; 10 is the furthest")
    erasing: Fraction = Field(0.0, description="probability of erasing a rectangle (arXiv 1708.04896)")
    mixup: NonNegative = Field(0.0, description="alpha of the Beta distribution, 0 is off (arXiv 1710.09412)")
    cutmix: NonNegative = Field(0.0, description="alpha of the Beta distribution, 0 is off (arXiv 1905.04899)")

    @property
    def mixes(self) -> bool:
        """Whether a sample is mixed with its neighbor."""
        return self.mixup > 0 or self.cutmix > 0

    def problems(self) -> Iterator[Problem]:
        for name in ("crop_scale", "crop_aspect", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                yield Problem((name,), f"expected [low, high] with 0 < low <= high, got [{low}, {high}]")
        if self.three_augment and (self.grayscale or self.solarize or self.blur):
            yield Problem(("three_augment",), "already takes grayscale, solarize or blur; leave their own at 0")
        if self.hue > 0.5:
            yield Problem(("hue",), f"expected at most 0.5, half a turn of the circle either way, got {self.hue}")
        if self.rand_augment_magnitude > 10:
            yield Problem(
                ("rand_augment_magnitude",), f"expected a magnitude from 0 to 10, got {self.rand_augment_magnitude}"
            )


class SupervisedConfig(Section):
    """The class of the whole image."""

    needs_labels: ClassVar[bool] = True
    name: Literal["supervised"] = Field(
        "supervised", description="supervised, mae or self_distillation; each has its own keys"
    )
    loss: Literal["cross_entropy", "binary_cross_entropy"] = Field(
        "cross_entropy", description="or binary_cross_entropy: each class by itself (arXiv 2110.00476)"
    )
    loss_reduction: Literal["mean", "sum"] = Field(
        "mean", description="of binary_cross_entropy over the classes; sum: as arXiv 2106.10270 does"
    )
    head_bias: float = Field(
        0.0, description="first value of the classifier's biases; -10: nearly no class is there (arXiv 2106.10270)"
    )
    label_smoothing: Rate = 0.0
    class_weights: Literal["none", "balanced"] | list[Positive] = Field(
        "none", description="of the loss; balanced: rare classes count as much as common ones; or a list"
    )
    patch_dropout: Rate = Field(0.0, description="share of the patches that training leaves out (arXiv 2208.07220)")
    augment: AugmentConfig = AugmentConfig()

    def problems(self) -> Iterator[Problem]:
        if self.loss_reduction == "sum" and self.loss == "cross_entropy":
            yield Problem(("loss_reduction", "loss"), "cross_entropy has one term, nothing to add up; use mean")


class MAEConfig(Section):
    """Masked autoencoding (arXiv 2111.06377): rebuild the pixels of the patches that the encoder is not shown."""

    needs_labels: ClassVar[bool] = False
    name: Literal["mae"] = "mae"
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.75, description="of mae: share of the patches that are hidden"
    )
    normalize_targets: bool = Field(True, description="of mae: whether each patch is rebuilt at its own brightness")
    decoder_hidden_size: Count = Field(512, description="of mae")
    decoder_num_hidden_layers: Count = Field(8, description="of mae")
    decoder_num_attention_heads: Count = Field(16, description="of mae")
    decoder_intermediate_size: Count = Field(2048, description="of mae")
    augment: AugmentConfig = AugmentConfig(crop_scale=(0.2, 1.0))

    def decoder(self, encoder: ModelConfig) -> ModelConfig:
        """Return the decoder as a ViT over the same patches."""
        return encoder.model_copy(
            update={
                "hidden_size": self.decoder_hidden_size,
                "num_hidden_layers": self.decoder_num_hidden_layers,
                "num_attention_heads": self.decoder_num_attention_heads,
                "intermediate_size": self.decoder_intermediate_size,
                "position_embedding": "sincos",
                "layer_scale": 0.0,
            }
        )

    def num_visible(self, encoder: ModelConfig) -> int:
        """Return how many patches the encoder is shown."""
        return int(encoder.num_patches * (1 - self.mask_ratio))

    def problems(self) -> Iterator[Problem]:
        width, heads = self.decoder_hidden_size, self.decoder_num_attention_heads
        if width % heads:
            yield Problem(
                ("decoder_num_attention_heads", "decoder_hidden_size"),
                f"{heads} heads don't divide decoder_hidden_size {width}; {_divisor_near(width, heads)} would",
            )
        if width % 4:
            yield Problem(("decoder_hidden_size",), f"its sincos positions need a multiple of 4, got {width}")
        if self.augment.mixes:
            yield Problem(("augment.mixup", "augment.cutmix"), "mixup and cutmix mix labels, and mae has none")


class SelfDistillationConfig(Section):
    """Self-distillation (DINO and iBOT; arXiv 2304.07193): a student learns what its own average, the teacher, says.

    The two large crops are augmented alike; DINOv2 blurs one of them nearly always and the other seldom.
    """

    needs_labels: ClassVar[bool] = False
    name: Literal["self_distillation"] = "self_distillation"
    local_crops: Count = Field(8, description="of self_distillation: small crops, which the student alone is shown")
    local_image_size: Count = Field(96, description="of self_distillation: pixels of a small crop's side")
    local_crop_scale: tuple[Fraction, Fraction] = Field(
        (0.05, 0.32), description="of self_distillation: share of the image's area that a small crop keeps"
    )
    mask_probability: Fraction = Field(0.5, description="of self_distillation: that patches of a large crop are hidden")
    mask_ratios: tuple[Fraction, Fraction] = Field(
        (0.1, 0.5), description="of self_distillation: smallest and largest share of the patches that is hidden then"
    )
    prototypes: Count = Field(65536, description="of self_distillation: how many answers a token can give")
    head_hidden_size: Count = Field(2048, description="of self_distillation")
    head_bottleneck_size: Count = Field(256, description="of self_distillation")
    student_temperature: Positive = Field(0.1, description="of self_distillation")
    teacher_temperature: Positive = Field(0.07, description="of self_distillation")
    first_teacher_temperature: Positive = Field(0.04, description="of self_distillation: at the run's beginning")
    temperature_warmup: Annotated[float, Field(gt=0, le=1)] = Field(
        0.3, description="of self_distillation: share of the run in which the teacher's temperature grows"
    )
    teacher_momentum: Rate = Field(
        0.992, description="of self_distillation: what the teacher keeps of itself in a step; 1 at the run's end"
    )
    koleo_weight: NonNegative = Field(0.1, description="of self_distillation: of the loss that spreads features")
    augment: AugmentConfig = AugmentConfig(
        crop_scale=(0.32, 1.0),
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        grayscale=0.2,
        solarize=0.1,
        blur=0.55,
    )

    def problems(self) -> Iterator[Problem]:
        for name in ("local_crop_scale", "mask_ratios"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                yield Problem((name,), f"expected [low, high] with 0 < low <= high, got [{low}, {high}]")
        if self.augment.mixes:
            yield Problem(("augment.mixup", "augment.cutmix"), "mixup and cutmix mix labels, and there are none")


def _name_of_objective(section: Any) -> str:
    """Return the name of an objective's section; without one it is the first."""
    return str(section.get("name", "supervised") if isinstance(section, dict) else section.name)


ObjectiveConfig: TypeAlias = Annotated[
    Annotated[SupervisedConfig, Tag("supervised")]
    | Annotated[MAEConfig, Tag("mae")]
    | Annotated[SelfDistillationConfig, Tag("self_distillation")],
    Discriminator(_name_of_objective),
]


class OptimizerConfig(Section):
    """AdamW (arXiv 1711.05101), LAMB (1904.00962) or Muon (2502.16982). What is no matrix is not decayed."""

    name: Literal["adamw", "lamb", "muon"] = Field(
        "adamw", description="adamw, lamb, or muon: of the blocks' matrices, adamw of the rest"
    )
    learning_rate: Positive = Field(1e-4, description="at the default global batch of 256")
    scaling: Literal["none", "linear", "sqrt"] = Field(
        "none",
        description="or linear: the rate times global_batch_size / 256 (arXiv 1706.02677); or sqrt, its root",
    )
    weight_decay: NonNegative = 0.05
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    epsilon: Positive = 1e-8
    momentum: Rate = Field(0.95, description="of muon")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="what the rate is multiplied by from block to block toward the patches (arXiv 2003.10555)"
    )

    def problems(self) -> Iterator[Problem]:
        if self.name == "lamb" and not self.weight_decay:
            yield Problem(("weight_decay", "name"), "lamb adapts what is decayed, and nothing is; name adamw, or decay")

    def peak(self, global_batch_size: int) -> float:
        """Return the highest learning rate, scaled to the batch as asked."""
        times = global_batch_size / 256
        return self.learning_rate * {"none": 1.0, "linear": times, "sqrt": math.sqrt(times)}[self.scaling]

    def explained(self, global_batch_size: int) -> str:
        """Say the highest learning rate, and how it came about."""
        times = {"none": "", "linear": f"{global_batch_size} / 256", "sqrt": f"sqrt({global_batch_size} / 256)"}
        rule = f" ({self.learning_rate:g} x {times[self.scaling]})" if self.scaling != "none" else ""
        return f"learning rate {self.peak(global_batch_size):.3g}{rule}"


class EmaConfig(Section):
    """An average of the weights over the last steps; where one is kept, it is validated, exported and started from."""

    decay: Rate = Field(0.0, description="0.9999 averages over some 10,000 steps, 0: none is kept")


class ScheduleConfig(Section):
    """Linear warm-up, then a way down. A step is one optimizer step on a global batch."""

    name: Literal["cosine", "linear", "wsd"] = Field(
        "cosine",
        description="or linear, or wsd: hold the peak until the cool-down; it can be lengthened before that",
    )
    total_steps: Count
    warmup_steps: CountOrZero = 0
    cooldown_steps: CountOrZero = Field(0, description="of wsd: the last steps, in which the rate falls as 1 - sqrt")
    final_learning_rate: NonNegative = 0.0
    image_sizes: list[tuple[Fraction, Count]] = Field(
        [], description="[[0.6, 128], [0.9, 192]]: until such a share of the run images have so many pixels a side"
    )

    def size_changes(self, global_batch_size: int) -> list[tuple[int, int]]:
        """Return until which position of the run images have which size, before they have the model's."""
        return [(round(share * self.total_steps) * global_batch_size, pixels) for share, pixels in self.image_sizes]

    def problems(self) -> Iterator[Problem]:
        if self.warmup_steps + self.cooldown_steps >= self.total_steps:
            yield Problem(
                ("warmup_steps", "total_steps"),
                f"{self.warmup_steps} steps of warm-up leave none of the {self.total_steps} to decay"
                if not self.cooldown_steps
                else f"{self.warmup_steps} steps of warm-up and {self.cooldown_steps} of cool-down leave none between",
            )
        shares = [share for share, _ in self.image_sizes]
        if shares != sorted(shares):
            yield Problem(("image_sizes",), f"the shares of the run must grow, got {shares}")
        if (self.name == "wsd") != (self.cooldown_steps > 0):
            yield Problem(("cooldown_steps", "name"), "wsd needs some, and nothing else has any")


class BatchConfig(Section):
    """The images of a step. Gradient accumulation is derived; ranks that don't divide the batch share it unevenly."""

    global_batch_size: Count = 256
    micro_batch_size: Count = Field(64, description="images that one rank takes through the model at a time, at most")
    gradient_clipping: NonNegative = Field(1.0, description="largest norm of the gradient, 0 is off")

    def accumulation_steps(self, world_size: int) -> int:
        """Return the micro-batches of a step: as many as the rank with the most images needs."""
        return -(-self.global_batch_size // (self.micro_batch_size * world_size))

    def problems_of_mixing(self, augment: AugmentConfig) -> Iterator[Problem]:
        """Yield what keeps neighbors from being mixed, as seen from the whole config."""
        for name in ("micro_batch_size", "global_batch_size"):
            if augment.mixes and getattr(self, name) % 2:
                sentence = f"mixup and cutmix pair neighbors, so {getattr(self, name)} must be even"
                yield Problem((f"engine.{name}",), sentence)


class EngineConfig(BatchConfig):
    """How DeepSpeed runs a step."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "bf16"
    offload_optimizer: bool = False
    activation_checkpointing: bool = False
    compile: bool = False

    def problems(self) -> Iterator[Problem]:
        if self.offload_optimizer and self.zero_stage == 0:
            yield Problem(("offload_optimizer", "zero_stage"), "offloading needs zero_stage 1, 2 or 3")


class EvaluationConfig(Section):
    """When the validation set is gone through: every so many steps, and at the end.

    A probe freezes the encoder and asks what its features are good for: k-NN and linear top-1 where there are labels,
    how many directions they use; and it draws where CLS looks, and what a masked autoencoder rebuilds.
    """

    every_steps: CountOrZero = Field(0, description="0: at the end only")
    probe_every_steps: CountOrZero = Field(0, description="0: no probes, not at the end either")
    probe_samples: Count = Field(
        10_000, description="images of the training set, spread over it, that probes learn from"
    )


class LoggingConfig(Section):
    """How often the ranks meet to write a row of metrics: the loop's only host synchronisation."""

    every_steps: Count = 20


class CheckpointConfig(Section):
    """When to save. The last step is always saved; older checkpoints go once a newer one is whole."""

    every_steps: Count = 1000
    keep_last: Count = 2
    keep_every: CountOrZero = Field(0, description="checkpoints at multiples of this many steps stay for good, 0: none")


class HealthConfig(Section):
    """Which steps are not taken, when a run goes back, and when one that hangs is ended."""

    spike_threshold: NonNegative = Field(
        20.0, description="a loss or gradient norm so many robust deviations above the median is a spike, 0: none is"
    )
    max_skipped_in_a_row: Count = Field(5, description="then the run goes back to its last checkpoint, past these")
    max_rollbacks: CountOrZero = Field(3, description="then the run ends")
    hang_seconds: NonNegative = Field(
        300.0, description="a rank that hangs so long ends the run; all that stand still, after 4 times that; 0: never"
    )


class TrackingConfig(Section):
    """Where MLflow keeps runs. Without a uri: SQLite beside the run folder, no server needed."""

    uri: str | None = Field(None, description="of an MLflow server or store; off: metrics.jsonl alone")
    experiment: str = "vitrail"


class PretrainConfig(Section):
    """A pretraining run."""

    run_dir: UserPath
    init_from: UserPath | None = Field(None, description="a run, a checkpoint or a Hugging Face folder to begin with")
    seed: CountOrZero = 0
    data: DataConfig
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = SupervisedConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    schedule: ScheduleConfig
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    tracking: TrackingConfig = TrackingConfig()

    def problems(self) -> Iterator[Problem]:
        yield from self.engine.problems_of_mixing(self.objective.augment)
        if self.engine.global_batch_size % self.data.repeats:
            sentence = f"{self.data.repeats} views don't divide a batch of {self.engine.global_batch_size}"
            yield Problem(("data.repeats", "engine.global_batch_size"), sentence)
        if self.evaluation.probe_every_steps and self.data.validation is None:
            yield Problem(
                ("data.validation", "evaluation.probe_every_steps"), "missing, and the probes are tested on it"
            )
        if isinstance(self.objective, MAEConfig) and self.objective.num_visible(self.model) < 1:
            keys = ("objective.mask_ratio", "model.image_size", "model.patch_size")
            yield Problem(keys, f"hides all of the {self.model.num_patches} patches; lower it")
        yield from self._problems_of_sizes()
        if isinstance(self.objective, SelfDistillationConfig):
            yield from self._problems_of_distillation(self.objective)

    def _problems_of_sizes(self) -> Iterator[Problem]:
        for _, pixels in self.schedule.image_sizes:
            if pixels % self.model.patch_size:
                sentence = f"patches of {self.model.patch_size} pixels don't divide an image of {pixels}"
                yield Problem(("schedule.image_sizes", "model.patch_size"), sentence)
        if self.schedule.image_sizes and not isinstance(self.objective, SupervisedConfig):
            sentence = f"{self.objective.name} knows the places of the patches, so images have one size"
            yield Problem(("schedule.image_sizes", "objective.name"), sentence)
        if self.schedule.image_sizes and self.data.decode == "gpu":
            yield Problem(("data.decode", "schedule.image_sizes"), "decodes to one size; use cpu")

    def _problems_of_distillation(self, objective: SelfDistillationConfig) -> Iterator[Problem]:
        if objective.local_image_size % self.model.patch_size:
            yield Problem(
                ("objective.local_image_size", "model.patch_size"),
                f"patches of {self.model.patch_size} pixels don't divide a small crop of {objective.local_image_size}",
            )
        if self.engine.zero_stage == 3:
            sentence = "self_distillation's teacher follows whole weights, which stage 3 cuts up; use 0, 1 or 2"
            yield Problem(("engine.zero_stage", "objective.name"), sentence)
        if self.ema.decay:
            yield Problem(("ema.decay", "objective.name"), "self_distillation's teacher is an average already; use 0")
        if self.data.decode == "gpu":
            yield Problem(("data.decode", "objective.name"), "self_distillation crops an image many times; use cpu")


def _divisor_near(total: int, wanted: int) -> int:
    """Return the divisor of `total` nearest to `wanted`."""
    return min((d for d in range(1, total + 1) if total % d == 0), key=lambda d: abs(d - wanted))
