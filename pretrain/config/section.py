"""The base class of every config section, and the types of its values."""

import os
import re
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


def expand(location: str) -> str:
    """Return a path or URL with ${VARIABLE} replaced by the variable's value, and ~ by the home folder if there is one.

    Raises:
        PydanticCustomError: If a variable is not set or is written in another way, or there is no such user.
    """
    if location.startswith("pipe:"):
        return location  # the shell that runs the command does this

    if unclear := re.search(r"(?:^|/)(\$[A-Za-z_]\w*)|(\$\{(?!\w+\})[^}]*\}?)", location):
        raise _impossible(f"{unclear[0].lstrip('/')} is not a variable that is expanded; write it as ${{NAME}}")

    def value(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise _impossible(f"the environment variable {found[1]} is not set; set it, or write the path out")
        return os.environ[found[1]]

    expanded = with_home(re.sub(r"\$\{(\w+)\}", value, location))
    if re.match(r"~[^/]", expanded):
        raise _impossible(f"{expanded.partition('/')[0]} is not the home folder of a user here; write the path out")
    return expanded


def _impossible(sentence: str) -> PydanticCustomError:
    return PydanticCustomError("impossible", "{sentence}", {"sentence": sentence, "keys": ()})


def with_home(path: str) -> str:
    """Return a path with ~ replaced by the home folder; unchanged where no home folder is known."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        return path


UserPath = Annotated[Path, AfterValidator(lambda path: Path(expand(str(path))))]
Location = Annotated[str, AfterValidator(expand)]

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
