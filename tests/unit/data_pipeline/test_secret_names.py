"""Secrets: names that hold one, logins in addresses, and their removal from text."""

from __future__ import annotations

import pytest

from data_pipeline.secrets import Redactor, is_secret_name, without_login


@pytest.mark.parametrize("name", ["HF_TOKEN", "HF_TOKEN_2", "MY_SECRETS", "OPENAI_API_KEY_2", "DB_PASSWORDS"])
def test_names_of_secrets_are_recognised(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "KEYBOARD"])
def test_names_that_only_resemble_a_secret_are_not(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://me:secret@host:5000/x", "http://host:5000/x"),
        ("https://token@host", "https://host"),
        ("http://me:secret@2@host", "http://host"),
        ("postgresql://me:secret@host/db", "postgresql://me@host/db"),
        ("redis://:secret@host/0", "redis://@host/0"),
        ("s3://key:secret@bucket/x.jsonl", "s3://key@bucket/x.jsonl"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("sqlite:////a/b@c d/mlflow.db", "sqlite:////a/b@c d/mlflow.db"),
        ("http://host/a@b", "http://host/a@b"),
    ],
)
def test_an_address_loses_its_password(address: str, expected: str) -> None:
    assert without_login(address) == expected


def test_only_the_values_of_secrets_are_redacted() -> None:
    redactor = Redactor(
        {"TOKENIZERS_PARALLELISM": "false!", "API_KEY": "short", "HOME": "/home/me", "A_TOKEN": "abcdef"}
    )
    assert redactor.redact("false! short /home/me abcdef sqlite:///a@b.db") == (
        "false! short /home/me <A_TOKEN> sqlite:///a@b.db"
    )
    assert Redactor({}).redact("plain") == "plain"


def test_a_login_in_text_is_redacted() -> None:
    assert Redactor({}).redact("at http://me:pass@host/x and x://a:b@c@d") == "at http://...@host/x and x://...@d"
