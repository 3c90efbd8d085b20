"""Reads the turns of a conversation as Messages.

Two formats are read: {role, content} and ShareGPT's {from, value}. A row is unusable if it has a key that would change
the text or the labels and that training does not support; the message names the key. Any other key is metadata
(`name`, `timestamp`, `id`) and is ignored. A key without a value (null, "", [], {}) counts as absent, as tables have
all keys in all rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast, get_args

from data_pipeline.config import ColumnMap
from data_pipeline.records import DataError, Message, Role
from data_pipeline.sources.cells import Cells, blank
from data_pipeline.text.templates import check_roles

SHAREGPT_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip

_TOOLS = "functions (tools) are not supported in training; leave such conversations out"
_REASONING = (
    "a reasoning text apart from the answer is not supported in training; write it into the answer, as the model's"
    " template does, or remove the key"
)
_WEIGHT = "mark the answers to train on by 'weight': 1 or 0"
_MEDIA = "only text is trained on; leave such conversations out"
# Keys that a turn must not have, and the remedy.
UNSUPPORTED_KEYS: dict[str, str] = {
    **dict.fromkeys(("tool_calls", "tool_call_id", "function_call", "tools", "functions"), _TOOLS),
    **dict.fromkeys(("reasoning_content", "reasoning", "reasoning_details", "thinking", "thought"), _REASONING),
    **dict.fromkeys(("train", "training", "trainable", "train_detail", "training_detail"), _WEIGHT),
    **dict.fromkeys(("loss", "loss_weight", "loss_mask", "mask", "masked"), _WEIGHT),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _MEDIA),
    "refusal": "a refusal apart from the content is not supported; write it into 'content'",
    "prefix": "a given beginning of the answer is not supported; write it into the prompt",
}
# Fields of a row, besides its turns, that change what a chat template writes.
UNSUPPORTED_FIELDS: dict[str, str] = {
    **dict.fromkeys(("tools", "functions"), _TOOLS),
    "documents": "documents for retrieval are not supported in training; write them into the conversation",
    "chat_template_kwargs": "variables of the chat template are the run's, in data.template.variables",
}
_TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython")


def read_turns(cells: Cells, columns: ColumnMap) -> tuple[Message, ...]:
    """The messages of a row, after the system message of another column if there is one. Raises BadRow."""
    column = cast(str, columns.messages)
    messages = read_conversation(cells, column, cells.optional_text(columns.system), unsupported_fields(columns))
    if messages[-1].role != "assistant" or all(turn.role != "user" for turn in messages):
        raise cells.bad(f"{column!r} must hold a user turn and end with the assistant's answer")
    if not any(message.trained for message in messages if message.role == "assistant"):
        raise cells.bad(f"{column!r}: every assistant turn has weight 0, so there is nothing to learn; remove the row")
    return messages


def read_conversation(
    cells: Cells, column: str, system: str | None, unsupported: Iterable[str] = UNSUPPORTED_FIELDS
) -> tuple[Message, ...]:
    """The messages in a column, after the message `system` if given; the last turn may have any role.

    Raises:
        BadRow: the turns are malformed or out of order, or the row fills a field of `unsupported`.
    """
    for field in unsupported:
        if cells.has(field) and cells.row[field] != {}:
            raise cells.bad(f"{field!r} beside {column!r}: {UNSUPPORTED_FIELDS[field]}")
    turns = cells.listed(column)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise cells.bad(f"{column!r} must be a list of {{role, content}}, or of {{from, value}}")
    if not turns:
        raise cells.bad(f"{column!r} must hold a user turn")
    start = () if system is None else (Message("system", system),)
    messages = (*start, *(_message(cells, turn, f"{column!r}[{number}]") for number, turn in enumerate(turns)))
    try:
        check_roles(tuple(message.role for message in messages))
    except DataError as error:
        raise cells.bad(f"{column!r}: {error}") from None
    return messages


def unsupported_fields(columns: ColumnMap) -> list[str]:
    """Fields that rows of conversations must not fill, except those that are mapped as a column."""
    mapped = columns.named()
    return [field for field in UNSUPPORTED_FIELDS if "messages" in mapped and field not in mapped.values()]


def _message(cells: Cells, turn: Mapping[str, Any], what: str) -> Message:
    given = {key: value for key, value in turn.items() if not _absent(value)}
    for key, remedy in UNSUPPORTED_KEYS.items():
        if key in given:
            raise cells.bad(f"{what} has {key!r}: {remedy}")
    role = _role(cells, given, what)
    text_keys = [key for key in ("content", "value") if key in given]
    if len(text_keys) == 2:
        raise cells.bad(f"{what} has both 'content' and 'value'; give one")
    key = text_keys[0] if text_keys else "value" if "from" in given else "content"
    content = cells.checked(turn.get(key), f"{what}.{key}")
    weight = given.get("weight")
    if weight is not None and (type(weight) not in (int, float) or weight not in (0, 1)):
        raise cells.bad(f"{what}.weight is {weight!r}; it must be 1 (trained on) or 0 (only read)")
    if weight == 1 and role != "assistant":
        raise cells.bad(f"{what}.weight is 1 on a {role} turn; only the assistant's turns are trained on")
    return Message(role, content, trained=role != "assistant" or weight != 0)


def _role(cells: Cells, given: Mapping[str, Any], what: str) -> Role:
    if "role" in given and "from" in given:
        raise cells.bad(f"{what} has both 'role' and 'from'; give one")
    name = given.get("from", given.get("role"))
    if name in _TOOL_ROLES:
        raise cells.bad(f"{what} has role {name!r}: {_TOOLS}")
    if "from" in given:
        if name not in SHAREGPT_ROLES:
            raise cells.bad(f"{what} is from {name!r}; it must be one of {', '.join(SHAREGPT_ROLES)}")
        return SHAREGPT_ROLES[name]
    if name not in get_args(Role):
        raise cells.bad(f"{what} has role {name!r}; it must be system, user or assistant")
    return cast(Role, name)


def _absent(value: Any) -> bool:
    return blank(value) or value == {}
