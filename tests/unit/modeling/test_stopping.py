"""Generation stops at the header of a next turn, which is taken from the template, also without an end token."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tokenizers import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_pipeline.text.next_turn import next_turn
from data_pipeline.text.templates import TemplateConfig
from evals.opening import open_model
from modeling.export_info import ExportInfo
from modeling.generation import Prompt, ShiftedGenerator
from modeling.stopping import Stops, TextStop
from tests.unit.evals.test_opening import write_model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ONE_TURN = "{% if messages|length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + ZEPHYR


@pytest.mark.parametrize(
    ("template", "matching", "others"),
    [
        ({"name": "alpaca"}, ["18\n\n### Instruction:\nTom", "18 ### Instruction: 5"], ["### Step 1", "instruction:"]),
        ({"name": "alpaca"}, ["18\n\nBelow is an instruction that describes a task. Write a response that "
                              "appropriately completes the request in Thai."], ["Below is the sum"]),
        ({"name": "plain"}, [], ["18\nTom has 5"]),
        ({"name": "custom", "prompt": "Question: {user}\nAnswer: "}, ["18\nQuestion: Tom"],
         ["The Question: how", "18\nAnswer: 18"]),
        ({"name": "custom", "prompt": "{system}USER: {user} ASSISTANT:"}, ["18 USER: Tom", "18\nUSER: a"],
         ["user: a", "SUPERUSER: a"]),
        ({"name": "custom", "prompt": "问题：{user}\n"}, ["18\n问题：小明"], ["这个问题：有5个"]),
        ({"name": "custom", "prompt": "The problem\n{user}\nSolution:"}, ["18\nThe problem\nTom"],
         ["18\nThe problem is solved."]),
        ({"name": "custom", "prompt": "A question in {language}: {user}\n"}, ["18\nA question in Thai: 5"], ["A"]),
    ],
)  # fmt: skip
def test_the_header_of_the_next_user_turn_is_found(
    template: dict[str, str], matching: list[str], others: list[str]
) -> None:
    found = next_turn(TemplateConfig(**template), byte_tokenizer())
    assert found.ids == ()
    pattern = re.compile("|".join(found.patterns) or "(?!)")
    assert [text for text in matching if pattern.search(text) is None] == []
    assert [text for text in others if pattern.search(text) is not None] == []


def test_the_header_of_a_chat_template_is_found() -> None:
    chat = TemplateConfig(name="chat")
    tokenizer = byte_tokenizer(CHATML, ("<|im_start|>", "<|im_end|>"))
    assert next_turn(chat, tokenizer).ids == (tokenizer.convert_tokens_to_ids("<|im_start|>"),)
    spelled = next_turn(chat, byte_tokenizer(ZEPHYR))
    assert spelled.ids == ()
    assert re.search("|".join(spelled.patterns), "18\n<|user|>\nTom")
    assert next_turn(chat, byte_tokenizer(ONE_TURN)) == next_turn(TemplateConfig(name="plain"), tokenizer)


class Scripted(LlamaForCausalLM):
    """Generates a given text in each row, whatever the prompt; `steps` counts forward passes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, script: list[str], width: int) -> None:
        super().__init__(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                num_attention_heads=1, max_position_embeddings=512, eos_token_id=1,
            )
        )  # fmt: skip
        self.script = [tokenizer.encode(text, add_special_tokens=False) for text in script]
        self.width, self.steps = width, 0

    def forward(self, *arguments: Any, **named: Any) -> Any:
        output = super().forward(*arguments, **named)
        place = self.steps
        self.steps += 1
        for row, ids in enumerate(self.script):
            output.logits[row, -1] = -100.0
            output.logits[row, -1, ids[place] if place < len(ids) else 5] = 100.0
        return output


def generated(template: dict[str, str], tokenizer: PreTrainedTokenizerFast, *script: str) -> tuple[list[Any], int]:
    model = Scripted(tokenizer, list(script), 2)
    generator = ShiftedGenerator(model, tokenizer, ExportInfo(), None)
    found = next_turn(TemplateConfig(**template), tokenizer)
    generator.stops = Stops(found.ids, found.patterns)
    return generator.generate([Prompt([9, 9])] * len(script), max_new_tokens=100), model.steps


def test_generation_ends_before_a_hallucinated_instruction() -> None:
    (first, second), steps = generated(
        {"name": "alpaca"},
        byte_tokenizer(),
        "#### 18 ডিম\n\n### Instruction:\nTom has 5 apples",
        "The answer is 20.</s>",
    )
    assert (first.text, first.finished) == ("#### 18 ডিম", True)
    assert len(first.token_ids) == len("#### 18 ডিম".encode())
    assert (second.text, second.finished) == ("The answer is 20.", True)
    assert steps < 45  # far fewer than max_new_tokens


def test_generation_ends_at_the_special_token_of_a_header() -> None:
    tokenizer = byte_tokenizer(CHATML, ("<|im_start|>", "<|im_end|>"))
    (only,), steps = generated({"name": "chat"}, tokenizer, "18<|im_start|>user\nTom has 5 apples")
    assert (only.text, only.finished, steps) == ("18", True, 3)


def test_without_a_header_nothing_is_cut() -> None:
    (only,), _ = generated({"name": "plain"}, byte_tokenizer(), "18\n\n### Instruction:\nTom has 5</s>")
    assert only.text == "18\n\n### Instruction:\nTom has 5"


def test_an_opened_model_stops_at_its_own_header_and_at_that_of_the_protocol(tmp_path: Path) -> None:
    own = {"name": "custom", "prompt": "Question: {user}\nAnswer: "}
    generator, _ = open_model(str(write_model(tmp_path, template=own)), template="alpaca")
    assert generator.stops.pattern is not None
    for text in ("18\nQuestion: Tom", "18\n### Instruction:\nTom"):
        assert generator.stops.pattern.search(text)


def test_each_row_stops_on_its_own() -> None:
    """The text of one row does not stop another row."""
    stop = Stops(patterns=("### Instruction:",))
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("18### Instruction: 5", add_special_tokens=False)
    assert tokenizer.decode(stop.cut(ids, tokenizer) or []) == "18"
    assert stop.cut(ids[:9], tokenizer) is None
    assert Stops().cut(ids, tokenizer) is None
    assert torch.tensor(stop.ids).numel() == 0


def test_rows_are_decoded_at_every_eighth_token_only() -> None:
    """Each check decodes every row; tokens generated between two checks are cut off afterwards."""
    decoded = []

    class Letters:
        def decode(self, ids: list[int], **_: object) -> str:
            decoded.append(len(ids))
            return "x" * len(ids)

    stop = TextStop(re.compile("x{10}"), Letters(), 3)  # type: ignore[arg-type]
    stopped = {length: stop(torch.zeros(2, 3 + length, dtype=torch.long), None).tolist() for length in range(1, 18)}  # type: ignore[arg-type]
    assert decoded == [8, 8, 16, 16]
    assert {length for length, found in stopped.items() if any(found)} == {16}
    assert stopped[16] == [True, True]
