"""YAML values of run files, overrides and site files, read and written.

PyYAML reads YAML 1.1, in which `1e6` is text, `no` (Norwegian) is false, 12:30:00 is a number and 2026-01-31 a date.
Here, as in YAML 1.2, `1e6` and `1e-5` are numbers, only `true` and `false` are booleans, and times and dates are text.
Underscores in numbers (`1_000`) are read as in YAML 1.1. A number with a leading zero (`007`) is text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

# (tag, its plain scalars, their first characters)
_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|[1-9][0-9_]*[eE]\+?[0-9]{1,2})|0x[0-9a-fA-F_]+|0o[0-7_]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:(?:0|[1-9][0-9_]*)(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    """Reads plain scalars by the rules above."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""


_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {first: [*found] for first, found in yaml.SafeDumper.yaml_implicit_resolvers.items()}
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "").lower()
    if "e" in text and not text.startswith("0x"):
        digits, _, exponent = text.partition("e")
        return int(digits) * 10 ** int(exponent)
    return int(text, 0)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read_yaml(text: str) -> Any:
    """The values of a document. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def compose_yaml(text: str) -> yaml.Node | None:
    """The document as nodes, with line numbers and repeated keys. Raises yaml.YAMLError."""
    return yaml.compose(text, _Loader)


def write_yaml(values: Any) -> str:
    """Plain values as text that `read_yaml` reads back unchanged; keys keep their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
