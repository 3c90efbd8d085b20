"""Reads run files: YAML and `key.sub=value` overrides; reports all mistakes at once, typos with the nearest key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from data_pipeline.secrets import without_login
from data_pipeline.sources.paths import PathError, check_folder
from data_pipeline.yaml_values import compose_yaml, read_yaml
from training.checks.inputs import missing_inputs
from training.config import NOT_OFFERED, RunConfig
from training.errors import ConfigError


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply `key.sub=value` overrides, validate.

    Missing files and folders are reported together with other mistakes. If there are no other mistakes, the command
    decides whether they must exist (`training.checks.inputs.missing_inputs`).

    Raises:
        ConfigError: one line for every mistake, with file and key.
    """
    values, mistakes = read_values(path, overrides)
    try:
        config = validate(values, str(path))
        check_folder(config.output_dir, f"{path}: output_dir:")
    except (ConfigError, PathError) as error:
        mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join([*mistakes, *(f"{path}: {line}" for line in missing_inputs(values))]))
    return config


def read_values(path: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """A YAML file's mapping with overrides applied, without validation, and a line for every mistake found so far.

    Raises:
        ConfigError: the file cannot be read, is no valid YAML, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        mistakes = [f"{path}:{repeated}" for repeated in _repeated_keys(compose_yaml(text))]
        values = read_yaml(text)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f":{place.line + 1}" if place else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping of keys, not {type(values).__name__}")
    for override in overrides:
        try:
            apply_override(values, override)
        except ConfigError as error:
            mistakes.append(str(error))
    return values, mistakes


def validate(values: dict[str, Any], origin: str) -> RunConfig:
    """RunConfig of a mapping; ConfigError with all mistakes at once, `origin` in front of each."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        found = error.errors()
        # A list with a wrong entry is also reported as too short, which it is not.
        wrong_inside = {item["loc"][:length] for item in found for length in range(len(item["loc"]))}
        shown = [item for item in found if item["type"] != "too_short" or item["loc"] not in wrong_inside]
        lines = dict.fromkeys(f"{origin}: {line}" for item in shown for line in _explain(item))
        raise ConfigError("\n".join(lines)) from None


def resolved(config: RunConfig) -> dict[str, Any]:
    """The config as plain YAML-ready values, every default filled in, passwords in addresses left out.

    It is written into the run folder, into checkpoints, and to MLflow.
    """
    values: dict[str, Any] = _without_logins(config.model_dump(mode="json"))
    return values


def refuse_logins(config: RunConfig, origin: Path) -> None:
    """For a job, whose config is written by `resolved`: without its logins, it would fail only once it runs.

    Raises:
        ConfigError: a line for every address with a login.
    """
    lines = []
    for key, address in _logins(config.model_dump(mode="json")):
        if key != "tracking.uri":
            instead = (
                "give it as its file system reads it (such as AWS_SECRET_ACCESS_KEY, or fsspec's FSSPEC_FTP_PASSWORD)"
            )
        elif address.startswith("http"):
            instead = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        else:
            instead = "give it as the database's driver reads it (such as PGPASSWORD)"
        lines.append(
            f"{origin}: {key}: holds a login, which is written into no job's files; leave it out, and {instead} in the "
            "shell that submits, from which jobs inherit it"
        )
    if lines:
        raise ConfigError("\n".join(lines))


def _logins(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(key, address) of all values from which `resolved` removes a login."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _logins(each, f"{path}.{key}".lstrip("."))
    elif _without_logins(value) != value:
        yield path, value


def _without_logins(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_logins(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_logins(each) for each in value]
    return without_login(value) if isinstance(value, str) else value


def _repeated_keys(node: yaml.Node | None, path: str = "", seen: set[int] | None = None) -> Iterator[str]:
    """A line for every key that its mapping has twice; PyYAML would silently keep the last."""
    seen = set() if seen is None else seen
    if node is None or id(node) in seen:  # the content of an anchor is checked once
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, entry in enumerate(node.value):
            yield from _repeated_keys(entry, f"{path}{number}.", seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused with the unknown keys
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                yield f"{line}: {path}{key.value}: given twice (lines {lines[name]} and {line}); keep one"
            lines.setdefault(name, line)
            yield from _repeated_keys(value, f"{path}{key.value}.", seen)


def apply_override(values: dict[str, Any], text: str) -> None:
    """Set the key of `key.sub=value` in nested values, in place; sections that are missing are added.

    Raises:
        ConfigError: not of that form, or a key below a value that is no section.
    """
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r}: must be key.sub=value, e.g. max_steps=100")
    try:
        value = read_yaml(raw)
    except yaml.YAMLError:
        raise ConfigError(f"override {text!r}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    node: Any = values
    for depth, name in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        if isinstance(node, list):
            node = node[_list_index(node, name, text)]
        else:
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
        if not isinstance(node, dict | list):
            raise ConfigError(f"override {text!r}: {where!r} holds a value, not a section")
    if isinstance(node, list):
        node[_list_index(node, last, text)] = value
    else:
        node[last] = value


def _list_index(node: list[Any], name: str, text: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise ConfigError(
            f"override {text!r}: {name!r} is not an index of a list of {len(node)} (0 to {len(node) - 1})"
        )
    return int(name)


def _explain(item: Any) -> list[str]:
    """A line for each mistake that pydantic reports as one item."""
    keys, known = _place(item["loc"])
    path = ".".join(map(str, keys)) or "(top level)"
    if item["type"] == "extra_forbidden":
        if (reason := NOT_OFFERED.get(path)) is not None:
            return [f"{path}: not offered: {reason}"]
        near = difflib.get_close_matches(str(keys[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return [f"{path}: unknown key; {hint}"]
    if item["type"] == "missing":
        return [f"{path}: required, but missing"]
    if item["type"] == "union_tag_not_found":
        return [f"{path}.name: required, but missing"]
    if item["type"] == "union_tag_invalid":
        return [f"{path}.name: {item['ctx']['tag']!r} is not one of {item['ctx']['expected_tags']}"]
    if item["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return [f"{path}: must be a section of keys (found {item['input']!r})"]
    message = item["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    if item["type"] == "value_error":
        return [f"{path}: {line}" for line in message.splitlines()]
    if item["type"] == "string_type" and isinstance(item["input"], int | float):
        message += ", in quotes"
    return [f"{path}: {message[0].lower()}{message[1:]} (found {item['input']!r})"]


def _place(location: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """The keys of a location, and the valid keys of the section that holds the last one, from the models' fields.

    pydantic also names the class of an objective and the branch of a union, as in `files.str`: those are left out.
    """
    keys: list[Any] = []
    known: list[str] = []
    annotation: Any = None
    options: list[type[BaseModel]] = [RunConfig]
    for part in location:
        if tagged := [model for model in options if "name" in model.model_fields and _tag(model) == part]:
            options = tagged
            continue
        fields = {name: field for model in options for name, field in model.model_fields.items()}
        if isinstance(part, int):
            keys.append(part)
        elif part in fields:
            keys.append(part)
            known, annotation = list(fields), fields[part].annotation
            options = _models_in(annotation)
        elif "[" in part:  # a branch, such as dict[str,...]; no key has brackets
            continue
        elif fields or any(get_origin(each) is dict for each in (annotation, *get_args(annotation))):
            keys.append(part)
            known, options = list(fields), []
    return keys, known


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in _models_in(part)]


def _tag(model: type[BaseModel]) -> Any:
    arguments = getattr(model.model_fields["name"].annotation, "__args__", (None,))
    return arguments[0]
