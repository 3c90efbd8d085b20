"""Errors of the hub's libraries as one line without secrets, for downloads (`prefetch.py`) and uploads (`push.py`)."""

from __future__ import annotations

import os

from data_pipeline.secrets import Redactor


def error_chain(error: BaseException) -> list[BaseException]:
    """The error, its cause, the cause's cause and so on."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)  # causes may form a cycle
    return causes


def one_line(error: BaseException) -> str:
    """The error's message, or its class if there is none."""
    return redacted(" ".join(str(error).split())[:300] or type(error).__name__)


def redacted(text: str) -> str:
    """The text without secrets of the environment and without the token of the hub, which may be in a file."""
    from huggingface_hub import get_token

    return Redactor({**os.environ, "HF_TOKEN": get_token() or ""}).redact(text)
