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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.records import BadRow, ChatSample, DataError, Message, Record, Role, stable_hash
from data_pipeline.text.templates import Slot, TemplateConfig, Turn, check_roles, make_template
from data_pipeline.text.tokenizer import UnencodableText, encode_batch, private_backend, token_offsets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Marks = npt.NDArray[np.int8]
Span = tuple[int, int]

_TEMPLATE, _CONTENT, _UNTRAINED, _ANSWER, _END = range(5)  # kinds of tokens; those from _ANSWER on are predicted


class _Part(NamedTuple):
    """A prompt or an answer."""

    text: str
    starts: list[int]  # of the pieces in which it is encoded
    mark: int  # the kind of its tokens, other than _CONTENT; of a prompt _TEMPLATE
    users: Sequence[Span]  # of user text

    @property
    def pieces(self) -> list[str]:
        return [self.text[start:stop] for start, stop in pairwise([*self.starts, len(self.text)])]


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
        ((ids, marks),) = self._tokens([self._parts(messages, language, response_language)])
        return ids, marks == _CONTENT

    def tokenize(self, record: Record, *, labelled: bool = True) -> ChatSample:
        """Tokenises a record; without its last answer and without labels if not `labelled`. Raises BadRow."""
        try:
            (found,) = self.tokenize_all([record], [labelled])
        except UnencodableText as error:
            raise BadRow(record.origin, str(error)) from error
        if isinstance(found, BadRow):
            raise found
        return found

    def tokenize_all(self, records: Sequence[Record], labelled: Sequence[bool]) -> list[ChatSample | BadRow]:
        """Tokenises records together. Raises UnencodableText."""
        layouts = [self._layout(record, each) for record, each in zip(records, labelled, strict=True)]
        tokens = iter(self._tokens([layout for layout in layouts if not isinstance(layout, BadRow)]))
        return [
            layout if isinstance(layout, BadRow) else self._sample(record, *next(tokens), labelled=each)
            for record, layout, each in zip(records, layouts, labelled, strict=True)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, including special tokens."""
        return self.decode_all([[int(i) for i in ids]])[0]

    def decode_all(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The texts of several lists of token ids, including special tokens, decoded together."""
        return list(self._backend.decode_batch(ids, skip_special_tokens=False))

    def rewritten(self, answers: Sequence[str]) -> list[str]:
        """Answers encoded and decoded; they differ from the answers if the tokenizer normalises text."""
        parts = [self._part(answer, [(0, len(answer))], self._special) for answer in answers]
        pieces = encode_batch(self._backend, [piece for part in parts for piece in part.pieces])
        return self.decode_all([[token for _ in part.starts for token in next(pieces).ids] for part in parts])

    def token_starts(self, content: str) -> list[int]:
        """Start of each token of a message in a prompt, in characters; the message is encoded without the template."""
        part = self._part(content, [(0, len(content))], self._control)
        pieces = encode_batch(self._backend, part.pieces, offsets=True)
        return [start + a for start, piece in zip(part.starts, pieces, strict=True) for a, _ in piece.offsets]

    def _layout(self, record: Record, labelled: bool) -> list[_Part] | BadRow:
        """The texts of a record's sample."""
        messages, response_language = record.conversation.messages, record.conversation.response_language
        if not record.parallel:
            if not messages or messages[-1].role != "assistant" or not messages[-1].content.strip():
                return BadRow(record.origin, "the last turn must be the assistant's answer, and not empty")
            if not any(message.trained for message in messages if message.role == "assistant"):
                return BadRow(record.origin, "no assistant turn is trained on: each has weight 0")
        for code in (record.language, response_language):
            if code not in self._language_ids:
                return BadRow(record.origin, f"the language {code!r} is not one of {', '.join(self.languages)}")
        try:
            prompt = messages if labelled or record.parallel else messages[:-1]
            return self._parts(prompt, record.language, response_language)
        except DataError as error:
            return BadRow(record.origin, str(error))

    def _sample(self, record: Record, ids: Ids, marks: Marks, *, labelled: bool) -> ChatSample:
        return ChatSample(
            id=record.id,
            group=stable_hash(record.group),
            content_hash=stable_hash(record.user_text),
            language=self._language_ids[record.language],
            response_language=self._language_ids[record.conversation.response_language],
            input_ids=ids,
            labels=(marks >= _ANSWER) & labelled,
            content=marks == _CONTENT,
            answer=((marks == _ANSWER) | (marks == _UNTRAINED)) & labelled,
            parallel=record.parallel,
        )

    def _parts(self, messages: Sequence[Message], language: str, response_language: str) -> list[_Part]:
        """The texts of a conversation: prompts and answers in turn. Raises DataError."""
        parts = []
        answers = [message for message in messages if message.role == "assistant"]
        for turn, message in zip_longest(self._turns_of(messages, language, response_language), answers):
            text, foreign, users = _fill(turn, messages)
            parts.append(self._part(text, foreign, self._control, users=users))
            if message is not None:
                answer = self.template.answer_slot.words(message.content)
                mark = _ANSWER if message.trained else _UNTRAINED
                parts.append(self._part(answer, [(0, len(answer))], self._special, mark))
        return parts

    def _part(
        self, text: str, foreign: Sequence[Span], forbidden: re.Pattern[str], mark: int = _TEMPLATE,
        users: Sequence[Span] = (),
    ) -> _Part:  # fmt: skip
        """A text, split so that no token of `forbidden` is made from characters in `foreign`.

        A tokenizer that adds a space before a text also adds one at each split.
        """
        cuts = [
            found.start() + 1
            for found in forbidden.finditer(text)
            if any(found.start() < stop and found.end(1) > start for start, stop in foreign)
        ]
        return _Part(text, [0, *cuts], mark, users)

    def _tokens(self, conversations: Sequence[Sequence[_Part]]) -> list[tuple[Ids, Marks]]:
        """Token ids (T,) and the kind of each token (T,) of conversations, encoded together. Raises UnencodableText."""
        pieces = {
            offsets: encode_batch(
                self._backend,
                [piece for parts in conversations for part in parts if bool(part.users) is offsets
                 for piece in part.pieces],
                offsets=offsets,
            )
            for offsets in (True, False)
        }  # fmt: skip
        start = [] if self.template.bos_id is None else [self.template.bos_id]
        found = []
        for parts in conversations:
            ids = [np.array(start, np.int32)]
            marks = [np.full(len(start), _TEMPLATE, np.int8)]
            for part in parts:
                for place in part.starts:
                    encoding = next(pieces[bool(part.users)])
                    ids.append(np.array(encoding.ids, np.int32))
                    marks.append(np.full(len(encoding), part.mark, np.int8))
                    if part.users:
                        _mark_users(marks[-1], part.text, token_offsets(encoding) + place, part.users)
                if part.mark != _TEMPLATE:
                    ids.append(np.array([self.template.end_id], np.int32))
                    marks.append(np.array([_END if part.mark == _ANSWER else _TEMPLATE], np.int8))
            marks_T = np.concatenate(marks)
            if len(marks_T) and marks_T[0] == _CONTENT:
                marks_T[0] = _TEMPLATE  # the first token is an attention sink, whatever its text
            found.append((np.concatenate(ids), marks_T))
        return found

    def _turns_of(self, messages: Sequence[Message], language: str, response_language: str) -> list[Turn]:
        roles = tuple(message.role for message in messages)
        key = (roles[:-1] if roles[-1:] == ("assistant",) else roles, language, response_language)
        if key not in self._turns:
            check_roles(roles)
            self._turns[key] = self.template.turns(*key)
        return self._turns[key]


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


def _mark_users(marks: Marks, text: str, offsets: npt.NDArray[np.int32], users: Sequence[Span]) -> None:
    """Marks tokens of user text as _CONTENT. Outside of the user text such a token may cover only white space."""
    starts, stops = offsets[:, 0], offsets[:, 1]
    for start, stop in users:
        within = (starts < stop) & (stops > start)
        for token in np.flatnonzero(within & ((starts < start) | (stops > stop))).tolist():
            within[token] = not (text[starts[token] : start] + text[stop : stops[token]]).strip()
        marks[within] = _CONTENT


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
