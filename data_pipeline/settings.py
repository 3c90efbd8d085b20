"""Base class of the sections of run files and site files, and the types of their paths."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from data_pipeline.sources.paths import expanded


class Section(BaseModel):
    """Base of every section: unknown keys are errors, numbers are finite, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def refuse(mistakes: Iterable[str]) -> None:
    """For validators: raises ValueError with one line per mistake if there are any."""
    if lines := list(mistakes):
        raise ValueError("\n".join(lines))


def _expanded(value: Any) -> Any:
    return expanded(str(value)) if isinstance(value, str | Path) else value


# A path, or a glob, address or hub name, in which `~` and environment variables are expanded.
RunPath = Annotated[Path, BeforeValidator(_expanded)]
PathText = Annotated[str, AfterValidator(expanded)]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every value that is neither a section nor a list."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(each, f"{path}.{key}".lstrip("."))
    else:
        yield path, value


Values = TypeVar("Values", bound=dict[str, Any])


def _finite(values: Values) -> Values:
    for path, value in _leaves(values):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path} is {value}; it must be a finite number")
    return values


def _no_boolean_words(values: Values) -> Values:
    for path, value in _leaves(values):
        if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
            raise ValueError(f"{path} is the text {value!r}; write true or false")
    return values


# Settings passed on to another library, for which there is no schema. Numbers must be finite; in `Plain`, texts such
# as "yes" that are meant as booleans are errors.
Raw = Annotated[Values, AfterValidator(_finite)]
Plain = Annotated[Values, AfterValidator(_finite), AfterValidator(_no_boolean_words)]


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested values to dotted keys. A list is one value, unless it is a list of sections."""
    if isinstance(values, list) and values and all(isinstance(value, Mapping) for value in values):
        values = dict(enumerate(values))
    if isinstance(values, Mapping) and values:
        return {
            inner: leaf
            for key, value in values.items()
            for inner, leaf in flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: values}


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(before, now) of every dotted key whose value differs, sorted by key; None if a side lacks the key."""
    old, new = flat(before), flat(now)
    return {
        key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    }
