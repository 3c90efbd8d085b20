"""YAML values are read as in YAML 1.2 and written so that they are read back unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from data_pipeline.yaml_values import read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e6", 1_000_000), ("2E3", 2000), ("-1e+2", -100), ("1_000", 1000), ("0x1F", 31), ("0o17", 15), ("0", 0),
        ("1e-5", 1e-5), ("1.5e3", 1500.0), (".5", 0.5), ("5.", 5.0), ("1e100", 1e100), ("-.inf", float("-inf")),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("y", "y"), ("true", True), ("False", False), ("nan", "nan"),
        ("~", None), ("", None), ("12:30:00", "12:30:00"), ("1:30", "1:30"), ("2026-01-31", "2026-01-31"),
        ("007", "007"), ("010", "010"), ("1.2.3", "1.2.3"), ("'1e6'", "1e6"), ('"no"', "no"), ("1e", "1e"),
    ],
)  # fmt: skip
def test_plain_scalars_are_read_as_in_yaml_1_2(text: str, value: Any) -> None:
    read = read_yaml(f"key: {text}")["key"]
    assert (type(read), read) == (type(value), value)


def test_keys_follow_the_same_rules_and_anchors_merge() -> None:
    assert read_yaml("a: &a {no: 1, 1e2: 2}\nb: {<<: *a, on: 3}") == {
        "a": {"no": 1, 100: 2}, "b": {"no": 1, 100: 2, "on": 3}
    }  # fmt: skip


@pytest.mark.parametrize("text", ["1e6", "1e-5", "no", "12:30:00", "2026-01-31", "0o17", "007", ".5", "~", "", "<<"])
def test_ambiguous_text_is_quoted_for_both_versions_of_yaml(text: str) -> None:
    written = write_yaml({"key": text})
    assert read_yaml(written) == yaml.safe_load(written) == {"key": text}


def test_numbers_are_read_back_unchanged() -> None:
    values = [1e-5, 1e6, 1e22, 1.5, 10**20, 3, True, None, float("inf"), "text"]
    assert list(map(repr, read_yaml(write_yaml(values)))) == list(map(repr, values))


def test_tags_that_would_run_code_are_refused() -> None:
    with pytest.raises(yaml.YAMLError):
        read_yaml("a: !!python/object/apply:os.getcwd []")
