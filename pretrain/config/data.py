"""The `data` section: where training and validation data comes from and how it is read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from pretrain.config.section import (
    COMMAND_LINE_ONLY,
    Count,
    CountOrZero,
    Fraction,
    Location,
    Positive,
    Problem,
    Section,
    UserPath,
    with_home,
)

BATCHES_AHEAD = 4  # of each data worker


class FaultBudget(Section):
    """Limits for unusable samples. Each one is replaced by another sample and listed in quarantine.jsonl."""

    max_bad_fraction: Fraction = Field(
        0.01, description="Fraction of unusable samples above which the run stops; 0 stops at the first one."
    )
    max_bad_consecutive: Count = Field(
        100, description="Number of consecutive unusable samples above which the run stops."
    )


class SourceConfig(FaultBudget):
    """Location of the data and resources for reading it. Shards behind a URL are cached on each machine's disk."""

    train: Location | list[Location] = Field(
        description="Training data: a path or URL (http, s3, gs, hf), or a list of several."
    )
    num_workers: CountOrZero = Field(
        4, description="Processes per rank that read, decode and crop; increase when training waits for data."
    )
    batches_ahead: Count = Field(
        BATCHES_AHEAD,
        description="Batches that each data worker prepares ahead; decrease it when memory or /dev/shm is small.",
    )
    num_threads: Count = Field(1, description="Reader threads per data worker; increase for slow or remote storage.")
    cache_dir: UserPath = Field(
        Path(with_home("~/.cache/vitrail")),
        description="Folder for cached remote shards and for indexes of read-only tars; choose one on a local disk of "
        "each machine.",
    )
    cache_bytes: Count = Field(
        100_000_000_000, description="Size limit of the cache in bytes, shared by all runs that use the same folder."
    )
    stall_seconds: Positive = Field(
        60.0, description="Seconds without data from a remote host before the run ends; increase for a slow host."
    )
    allow_pipe: bool = Field(
        False,
        description="Whether a shard may be a shell command, written as pipe:COMMAND; set it on the command line only.",
        json_schema_extra={COMMAND_LINE_ONLY: True},
    )


class DataConfig(SourceConfig):
    """Training and validation data: shard sets from `vitrail shards make` or `vitrail shards index`."""

    weights: list[Positive] | None = Field(
        None,
        description="Relative sampling frequency of each training set; null concatenates them into a single set.",
    )
    validation: Location | None = Field(
        None, description="Validation data: a path or URL; null trains without validation."
    )
    stream: bool = Field(
        False,
        description="Whether to read tars front to back without an index; the order and resuming are then not exact.",
    )
    shuffle_buffer: Count = Field(
        1000, description="Samples per data worker among which a stream picks the next one; more shuffles better."
    )
    class_names: UserPath | None = Field(
        None,
        description="Text file with one class name per line, in label order, for a stream; null takes validation's.",
    )
    decode: Literal["cpu", "gpu"] = Field(
        "cpu",
        description="Device that decodes training JPEGs; gpu relieves busy workers and needs the extra [gpu-decode].",
    )
    shuffle_window: Count = Field(
        64, description="Number of shards whose samples are shuffled together; more mixes better and caches more."
    )
    repeats: Count = Field(
        1, description="Augmented views of each image in a global batch (repeated augmentation, arXiv 1901.09335)."
    )

    def problems(self) -> Iterator[Problem]:
        num_sets = len(self.train) if isinstance(self.train, list) else 1
        if self.weights is not None and len(self.weights) != num_sets:
            yield Problem(
                ("weights", "train"),
                f"has {len(self.weights)} values but data.train has {num_sets}; give one weight per training set",
            )
        if self.stream and self.weights is not None:
            yield Problem(("weights", "stream"), "a stream cannot mix by weight; remove weights, or index the tars")
        if self.stream and self.repeats > 1:
            yield Problem(("repeats", "stream"), "a stream cannot repeat images; set repeats=1, or index the tars")
        if self.class_names is not None and not self.stream:
            yield Problem(
                ("class_names", "stream"),
                "only a stream uses them, because an index has its own; remove class_names, or set stream=true",
            )
