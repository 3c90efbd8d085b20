"""What all sections of run files and site files have in common, and the types of their paths.

In: nothing. Out: `Section`, and types of fields. Next: the rooms' own config models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from data_pipeline.paths import expanded


class Section(BaseModel):
    """Base of every section: unknown keys are refused, numbers are finite, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _expanded(value: Any) -> Any:
    return expanded(str(value)) if isinstance(value, str | Path) else value


# A path, or the text of a glob, an address or a hub name, in which `~` and variables are filled in.
RunPath = Annotated[Path, BeforeValidator(_expanded)]
PathText = Annotated[str, AfterValidator(expanded)]


def _not_values(value: Any, path: str = "") -> Iterator[str]:
    """What is wrong with values that are handed on as they are: pydantic knows no type of theirs."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_values(each, f"{path}.{key}".lstrip("."))
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{path} is {value}; it must be a finite number"
    elif isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
        yield f"{path} is the text {value!r}; write true or false"


Values = TypeVar("Values", bound=dict[str, Any])


def _plain(values: Values) -> Values:
    if lines := list(_not_values(values)):
        raise ValueError("\n".join(lines))
    return values


# Keys of another library's: nothing in them is infinite, no text stands for a boolean.
Plain = Annotated[Values, AfterValidator(_plain)]
RawValues = Plain[dict[str, Any]]
