"""The base class of every config section, and the types of its values."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
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

# Marks fields that a config file must not set, because they let it run programs.
COMMAND_LINE_ONLY = "command_line_only"


class Problem(NamedTuple):
    """A combination of values that cannot work.

    Attributes:
        keys: Dotted keys that are involved, relative to the section; the error is shown at the first one.
        sentence: Error message of the form `<what is wrong>; <how to fix it>`.
    """

    keys: tuple[str, ...]
    sentence: str


class Section(BaseModel):
    """Base class of every section: unknown keys and wrong types are errors, and values never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def problems(self) -> Iterator[Problem]:
        """Yield the combinations of values that cannot work, which no single field can detect."""
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


def range_problems(section: Section, *names: str) -> Iterator[Problem]:
    """Yield a problem for each field whose [low, high] is not a range of positive numbers."""
    for name in names:
        low, high = getattr(section, name)
        if not 0 < low <= high:
            yield Problem((name,), f"must be [low, high] with 0 < low <= high, got [{low}, {high}]; correct the range")


def closest_divisor(total: int, wanted: int) -> int:
    """Return the divisor of `total` that is closest to `wanted`."""
    return min((d for d in range(1, total + 1) if total % d == 0), key=lambda d: abs(d - wanted))
