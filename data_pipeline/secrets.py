"""Secrets: which variable names hold one, which addresses contain a login, and how both are hidden in text.

The only list of secret names: logs, job scripts and MLflow use it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_SECRET_NAME = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|KEY|CREDENTIAL)S?(_?\d+)?$", re.IGNORECASE)
_MIN_SECRET_LENGTH = 6  # a shorter value would be found inside ordinary words
_HTTP_LOGIN = re.compile(r"(https?://)[^/\s]+@", re.IGNORECASE)
_PASSWORD = re.compile(r"(://[^/@:\s]*):[^/\s]*@")
_LOGIN_IN_TEXT = re.compile(r"(?<=://)[^/@\s]+:[^/\s]+(?=@)")


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name, such as HF_TOKEN, holds a secret."""
    return _SECRET_NAME.search(name) is not None


def without_login(address: str) -> str:
    """The address without its password; http(s) addresses without the user too, as clients would try the user alone."""
    return _PASSWORD.sub(r"\1@", _HTTP_LOGIN.sub(r"\1", address))


class Redactor:
    """Replaces the values of secret variables, and logins in addresses, in text that is printed or logged."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._names = {
            value: name
            for name, value in environment.items()
            if is_secret_name(name) and len(value) >= _MIN_SECRET_LENGTH
        }
        longest_first = sorted(self._names, key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, longest_first))) if self._names else None

    def redact(self, text: str) -> str:
        """`text` with `<HF_TOKEN>` in place of the value of HF_TOKEN."""
        if self._values is not None:
            text = self._values.sub(lambda match: f"<{self._names[match[0]]}>", text)
        return _LOGIN_IN_TEXT.sub("...", text)
