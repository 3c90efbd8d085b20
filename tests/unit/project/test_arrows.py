"""What import-linter cannot check: data_pipeline, modeling and evals do not import torch.distributed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("room", ["data_pipeline", "modeling", "evals"])
def test_no_room_but_training_imports_torch_distributed(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    violations = [file for file in files if any(name.startswith("torch.distributed") for name in imported(file))]
    assert not violations
