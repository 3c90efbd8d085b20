"""Counts the places in a step that would wait for a GPU: reads of values, and results whose size depends on values.

On CPU nothing waits, so the operations are counted instead: what `Tensor.item`, `float`, `bool`, indexing by a mask and
the like dispatch, and the methods that copy to the host.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SOURCE = Path(__file__).resolve().parents[1]
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "allclose", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "bincount",
}  # fmt: skip
COPIES = ("tolist", "numpy", "cpu", "__array__")  # not dispatched for tensors on CPU


@contextmanager
def device_reads() -> Iterator[list[str]]:
    """Context in which the reads of this thread are listed as "operation: file function" of the caller."""
    found: list[str] = []
    thread = threading.get_ident()

    def note(operation: str) -> None:
        if threading.get_ident() == thread:
            found.append(f"{operation}: {_caller()}")

    def noting(method: Any, name: str) -> Any:
        def noted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            note(name)
            return method(tensor, *arguments, **options)

        return noted

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function.overloadpacket.__name__
            if name in WAITING or _sized_by_values(name, args, kwargs or {}):
                note(name)
            return function(*args, **(kwargs or {}))

    with ExitStack() as stack:
        for name in COPIES:
            stack.enter_context(patch.object(Tensor, name, noting(getattr(Tensor, name), name)))
        stack.enter_context(Watch())
        yield found


def _sized_by_values(name: str, args: Any, kwargs: Any) -> bool:
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and isinstance(args[-1], Tensor)
    if name in ("index", "index_put", "index_put_"):
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    return False


def _caller() -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        if path != Path(__file__) and not any(part in ("torch", "unittest") for part in path.parts):
            break
        frame = frame.f_back
    parts = Path(frame.f_code.co_filename).parts
    place = parts[parts.index("site-packages") + 1 :] if "site-packages" in parts else parts[len(SOURCE.parts) :]
    return f"{'/'.join(place)} {frame.f_code.co_name}"
