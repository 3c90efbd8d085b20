"""The error of this package, and pydantic's validation errors in one line each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from pydantic import BaseModel, ValidationError


class SlurmError(Exception):
    """One line that names the file, option or job, what is wrong and what would be right."""

    exit_status = 2


def mistakes(error: ValidationError, model: type[BaseModel], origins: Mapping[str, str]) -> SlurmError:
    """One line per mistake. `origins`: where each key was given, a file's name or the option."""
    return SlurmError("\n".join(_line(item, model, origins) for item in error.errors()))


def _line(item: object, model: type[BaseModel], origins: Mapping[str, str]) -> str:
    assert isinstance(item, dict)
    place = [str(part) for part in item["loc"] if not str(part).startswith(("function-", "lax-", "json-"))]
    message = item["msg"].removeprefix("Value error, ")
    if not place and (key := message.partition(": ")[0]) in origins:  # found when the keys were validated together
        place, message = [key], message.partition(": ")[2]
    origin = origins.get(place[0]) if place else None
    # For an option, the origin is the key; for a file, the key follows the file's name.
    of_option = [part for part in place[1:] if not part.isdigit()]
    path = ".".join(of_option if origin and origin.startswith("--") else place)
    where = ": ".join(filter(None, [origin, path]))
    if item["type"] == "extra_forbidden":
        known = _known(model, place[:-1])
        near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{where}: required, but missing"
    if item["type"] == "value_error":
        return ": ".join(filter(None, [where, message]))
    return f"{where}: {message[0].lower()}{message[1:]} (found {item['input']!r})"


def _known(model: type[BaseModel], place: list[str]) -> list[str]:
    """Keys of the section at `place`."""
    for name in place:
        for each in (
            model.model_fields[name].annotation,
            *getattr(model.model_fields[name].annotation, "__args__", ()),
        ):
            if isinstance(each, type) and issubclass(each, BaseModel):
                model = each
    return list(model.model_fields)
