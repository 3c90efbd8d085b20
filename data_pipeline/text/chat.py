"""Tokenises conversations: token ids, and the kind of every token (content, answer, label or template).

Each prompt and each answer is tokenised separately, so a training sample begins with exactly the tokens that
generation is given. Text that spells a special token is never encoded as one: it is split inside the spelling before
tokenisation.

Shapes: T tokens of a sample.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise, zip_longest
from typing import TYPE_CHECKING
from unicodedata import normalize

import numpy as np
import numpy.typing as npt

from data_pipeline.records import BadRow, ChatSample, DataError, Message, Record, Role, stable_hash
from data_pipeline.text.templates import Slot, TemplateConfig, Turn, check_roles, make_template
from data_pipeline.text.tokenizer import private_backend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Span = tuple[int, int]

_TEMPLATE, _CONTENT, _UNTRAINED, _ANSWER, _END = range(5)  # kinds of tokens; those from _ANSWER on are predicted
_SHOWN = 60  # characters shown of a text in a message


class Chat:
    """Tokenises conversations with one template. Thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: TemplateConfig, languages: Sequence[str]) -> None:
        """Raises DataError if the template does not work with the tokenizer."""
        if not tokenizer.is_fast:
            raise DataError(f"{tokenizer.name_or_path!r} is not a fast tokenizer, so it has no offsets")
        self.tokenizer = tokenizer
        self.config = template
        self.languages = tuple(languages)
        self._language_ids = {code: number for number, code in enumerate(languages)}
        self.template = make_template(template, tokenizer)
        self._backend = private_backend(tokenizer)
        added = [token for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace()]
        end = str(self._backend.id_to_token(self.template.end_id))
        written = str(tokenizer.chat_template if template.name == "chat" else template.prompt)
        self._special = _occurrences(t.content for t in added if t.special or t.content == end)
        # In prompts also the added tokens that the template writes, whether or not they are marked as special.
        self._control = _occurrences(t.content for t in added if t.special or t.content in written + end)
        self._turns: dict[tuple[tuple[Role, ...], str, str], list[Turn]] = {}

    def prompt_ids(self, messages: Sequence[Message], language: str, response_language: str) -> tuple[Ids, Mask]:
        """The prompt of the next answer: token ids (T,) and the content mask (T,).

        Args:
            messages: must end with a user turn.
            language: code of the prompt's language; "" if not known.
            response_language: code of the answer's language; "" if not known.

        Raises:
            DataError: the turns are out of order, or the template names a language that is not known.
        """
        if not messages or messages[-1].role != "user":
            raise DataError("a prompt ends with a user's turn")
        ids, marks = self._tokens(messages, language, response_language)
        return ids, marks == _CONTENT

    def tokenize(self, record: Record, *, labelled: bool = True) -> ChatSample:
        """Tokenises a record; without its last answer and without labels if not `labelled`. Raises BadRow."""
        messages, response_language = record.conversation.messages, record.conversation.response_language
        if not messages or messages[-1].role != "assistant" or not messages[-1].content.strip():
            raise BadRow(record.origin, "the last turn must be the assistant's answer, and not empty")
        if not any(message.trained for message in messages if message.role == "assistant"):
            raise BadRow(record.origin, "no assistant turn is trained on: each has weight 0")
        for code in (record.language, response_language):
            if code not in self._language_ids:
                raise BadRow(record.origin, f"the language {code!r} is not one of {', '.join(self.languages)}")
        try:
            ids, marks = self._tokens(messages if labelled else messages[:-1], record.language, response_language)
        except DataError as error:
            raise BadRow(record.origin, str(error)) from error
        return ChatSample(
            id=record.id,
            group=stable_hash(record.group),
            content_hash=stable_hash(record.user_text),
            language=self._language_ids[record.language],
            response_language=self._language_ids[response_language],
            input_ids=ids,
            labels=(marks >= _ANSWER) & labelled,
            content=marks == _CONTENT,
            answer=((marks == _ANSWER) | (marks == _UNTRAINED)) & labelled,
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, including special tokens."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=False))

    def rewritten(self, answer: str) -> str:
        """An answer encoded and decoded; differs from the answer if the tokenizer normalises text."""
        return self.decode(self._encode(answer, [(0, len(answer))], self._special)[0])

    def token_starts(self, content: str) -> list[int]:
        """Start of each token of a message in a prompt, in characters; the message is encoded without the template."""
        return [start for start, _ in self._encode(content, [(0, len(content))], self._control)[1]]

    def _tokens(
        self, messages: Sequence[Message], language: str, response_language: str
    ) -> tuple[Ids, npt.NDArray[np.int8]]:
        """Token ids (T,) and the kind of each token (T,)."""
        ids = [] if self.template.bos_id is None else [self.template.bos_id]
        marks = [_TEMPLATE] * len(ids)
        answers = [message for message in messages if message.role == "assistant"]
        for turn, message in zip_longest(self._turns_of(messages, language, response_language), answers):
            text, foreign, users = _fill(turn, messages)
            new, offsets = self._encode(text, foreign, self._control)
            ids += new
            marks += _marks(text, offsets, users)
            if message is not None:
                answer = self.template.answer_slot.words(message.content)
                new, _ = self._encode(answer, [(0, len(answer))], self._special)
                ids += [*new, self.template.end_id]
                marks += [*[_ANSWER] * len(new), _END] if message.trained else [*[_UNTRAINED] * len(new), _TEMPLATE]
        if marks[:1] == [_CONTENT]:
            marks[0] = _TEMPLATE  # the first token is an attention sink, whatever its text
        return np.array(ids, dtype=np.int32), np.array(marks, dtype=np.int8)

    def _turns_of(self, messages: Sequence[Message], language: str, response_language: str) -> list[Turn]:
        roles = tuple(message.role for message in messages)
        key = (roles[:-1] if roles[-1:] == ("assistant",) else roles, language, response_language)
        if key not in self._turns:
            check_roles(roles)
            self._turns[key] = self.template.turns(*key)
        return self._turns[key]

    def _encode(self, text: str, foreign: Sequence[Span], forbidden: re.Pattern[str]) -> tuple[list[int], list[Span]]:
        """Token ids and their character offsets. No token of `forbidden` is made from characters in `foreign`.

        A tokenizer that adds a space before a text also adds one at each split.
        """
        cuts = [
            found.start() + 1
            for found in forbidden.finditer(text)
            if any(found.start() < stop and found.end(1) > start for start, stop in foreign)
        ]
        ids: list[int] = []
        offsets: list[Span] = []
        for start, stop in pairwise([0, *cuts, len(text)]):
            try:
                encoding = self._backend.encode(text[start:stop], add_special_tokens=False)
            except TypeError as error:  # the text cannot be encoded in UTF-8
                raise DataError("the text is not valid Unicode: it holds half a surrogate pair") from error
            ids += encoding.ids
            offsets += [(a + start, b + start) for a, b in encoding.offsets] if start else encoding.offsets
        return ids, offsets


def _occurrences(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches every spelling of one of the tokens, overlapping ones too; group 1 is the token.

    Tokens of a single character are omitted, as they cannot be split.
    """
    spelled = sorted((token for token in tokens if len(token) > 1), key=lambda token: (-len(token), token))
    if not spelled:
        return re.compile(r"(?!)")
    first = "".join(sorted({re.escape(token[0]) for token in spelled}))
    return re.compile(f"(?=[{first}])(?=({'|'.join(map(re.escape, spelled))}))")


def _fill(turn: Turn, messages: Sequence[Message]) -> tuple[str, list[Span], list[Span]]:
    """The text of a prompt, the spans of all messages in it, and the spans of the user messages."""
    text, foreign, users = "", [], []
    for part in turn:
        if isinstance(part, Slot):
            message = messages[part.message]
            words = part.words(message.content)
            span = (len(text), len(text) + len(words))
            foreign.append(span)
            if message.role == "user":
                users.append(span)
            text += words
        else:
            text += part
    return text, foreign, users


def _marks(text: str, offsets: Sequence[Span], users: Sequence[Span]) -> list[int]:
    """Marks tokens of user text as _CONTENT. Outside of the user text such a token may cover only white space."""

    def within(a: int, b: int, start: int, stop: int) -> bool:
        return a < stop and b > start and not (text[a:start] + text[stop:b]).strip()

    marks = [_TEMPLATE] * len(offsets)
    for start, stop in users:
        for i, (a, b) in enumerate(offsets):
            if within(a, b, start, stop):
                marks[i] = _CONTENT
    return marks


def _runs(mask: Mask) -> list[Span]:
    """(start, stop) of every run of True in a mask (T,)."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def check_labels(chat: Chat, record: Record, sample: ChatSample) -> None:
    """Decodes the labelled tokens and compares them with the record's answers.

    Raises:
        DataError: the mask is wrong: empty, too narrow, too wide, or without the end token.
        BadRow: the mask is correct, but the tokenizer cannot represent the answer.
    """

    def fail(what: str) -> None:
        raise DataError(f"{record.origin}: label mask: {what}")

    messages = record.conversation.messages
    template = chat.template
    answers = [template.answer_slot.words(m.content) for m in messages if m.role == "assistant" and m.trained]
    runs, end = _runs(sample.labels), template.end_id
    if not runs:
        fail("no token is labelled")
    if len(runs) != len(answers):
        fail(f"{len(runs)} labelled runs of tokens for {len(answers)} answers")
    for (start, stop), answer in zip(runs, answers, strict=True):
        ids = sample.input_ids[start:stop]
        if ids[-1] != end:
            fail(f"the end token {chat.decode([end])!r} is not its last token")
        if end in ids[:-1]:
            fail(f"it continues after the end token {chat.decode([end])!r}")
        written = chat.decode(ids[:-1])
        if written == answer:
            continue
        if written != (kept := chat.rewritten(answer)):
            fault = "too wide" if kept in written else "too narrow" if written in kept else "another text"
            fail(f"it is {fault}: {_short(written)} instead of {_short(answer)}")
        if _normal(written) != _normal(answer):
            raise BadRow(record.origin, _unlike(written, answer))
    if not np.array_equal(sample.answer & sample.labels, sample.labels & (sample.input_ids != end)):
        fail("the answer mask is not the labels without end tokens")
    if sample.content[0] or (sample.content & sample.labels).any():
        fail("a content token is the first token or is labelled")


def _normal(text: str) -> str:
    """The text without differences of composed characters and runs of white space, which tokenizers normalise."""
    return normalize("NFKC", " ".join(text.split()))


def _unlike(written: str, answer: str) -> str:
    """Why an answer cannot be used: both texts (long ones around the first difference) and the lost character."""
    texts = [_normal(written), _normal(answer)]
    at = next((n for n, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    shown = [_short(each) for each in (written, answer)]
    if max(map(len, texts)) > _SHOWN:
        shown = [_around(each, at) for each in texts]
    lost = f": U+{ord(texts[1][at]):04X} is lost" if at < len(texts[1]) else ""
    return f"the tokenizer writes {shown[0]} for {shown[1]}{lost}; change or remove the row"


def _around(text: str, at: int) -> str:
    start, stop = max(at - _SHOWN // 2, 0), at + _SHOWN // 2
    return repr(f"{'...' * (start > 0)}{text[start:stop]}{'...' * (stop < len(text))}")


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}...{text[-_SHOWN // 2 :]}")


def describe(sample: ChatSample, tokenizer: PreTrainedTokenizerBase) -> str:
    """A readable text of a sample: ⟦content: user text⟧, ⟦label: predicted text⟧, template text unmarked."""
    kinds = np.where(sample.labels, "label", np.where(sample.content, "content", ""))
    text = f"{sample.id}: {len(sample)} tokens, {sample.content.sum()} content, {sample.labels.sum()} label\n"
    position = 0
    for kind, run in groupby(kinds.tolist()):
        ids = sample.input_ids[position : (position := position + len(list(run)))].tolist()
        words = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        text += f"⟦{kind}: {words}⟧" if kind else words
    return text
