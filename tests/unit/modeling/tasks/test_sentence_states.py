"""Pooled states are means of transformers' hidden states, whatever the padding, head or batch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from modeling.errors import ModelError
from modeling.tasks.sentence_states import SentenceStates

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"vocab_size": 40, "max_position_embeddings": 24, "initializer_range": 0.3}
IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
TEXTS = ["one two three", "ten", "six five four three two one six seven eight", "nine nine ???"]
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    names = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        words.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        padding_side="left",  # a decoder's; states do not depend on it
    )  # fmt: skip


def saved(folder: Path, kind: str, auto: Any, template: str | None = "<s> $A </s>") -> Path:
    torch.manual_seed(0)
    extra = {"num_key_value_heads": 1} if kind == "llama" else {}
    auto.from_config(AutoConfig.for_model(kind, **SIZES, **IDS, **extra)).save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder


def reported(folder: Path, ids: list[int]) -> list[Tensor]:
    """(T, H) of each h[l] of one unpadded text: the hidden states of transformers."""
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return [state[0] for state in model(torch.tensor([ids]), output_hidden_states=True).hidden_states]


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        ("xlm-roberta", AutoModelForSequenceClassification),
        ("xlm-roberta", AutoModelForMaskedLM),
        ("bert", AutoModelForQuestionAnswering),
        ("bert", AutoModel),
    ],
)
def test_states_of_an_encoder_in_a_padded_batch_equal_those_one_by_one(
    tmp_path: Path, kind: str, auto: Any, pooling: Any
) -> None:
    folder = saved(tmp_path, kind, auto)
    states = SentenceStates.open(folder, pooling=pooling)
    encoded = states.encode(TEXTS)
    found = states.pooled(encoded)
    assert found.shape == (4, 4, 16)
    assert found.dtype == torch.float32
    assert [text.ids for text in encoded][1] == [0, 13, 2]
    assert encoded[3].ids[1:-1] == [12, 12, 3]  # an unknown word counts as a word
    for row, text in enumerate(encoded):
        for layer, state in enumerate(reported(folder, text.ids)):
            expected = state[1:-1].mean(dim=0) if pooling == "mean" else state[0]
            torch.testing.assert_close(found[layer, row], expected, rtol=1e-4, atol=1e-5)
    assert not list(states.model.encoder.layer[0]._forward_pre_hooks)


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", None])
def test_states_of_a_decoder_exclude_the_first_token(tmp_path: Path, template: str | None) -> None:
    folder = saved(tmp_path, "llama", AutoModelForCausalLM, template)
    states = SentenceStates.open(folder)
    encoded = states.encode(TEXTS)
    found = states.pooled(encoded)
    assert states.is_decoder
    for row, text in enumerate(encoded):
        first = 0 if text.ids == [13] else 1  # excluded, unless it is the only word
        last = len(text.ids) - (text.ids[-1] == 2)
        for layer, state in enumerate(reported(folder, text.ids)[:3]):  # the last is after the final norm there
            torch.testing.assert_close(found[layer, row], state[first:last].mean(dim=0), rtol=1e-4, atol=1e-5)


def test_long_sentences_are_cut_and_counted(tmp_path: Path) -> None:
    folder = saved(tmp_path, "xlm-roberta", AutoModelForMaskedLM)
    states = SentenceStates.open(folder, max_length=6)
    encoded = states.encode(["one two three four", "one two three four five", " ".join(WORDS)])
    assert [text.ids for text in encoded][1:] == [[0, 4, 5, 6, 7, 2]] * 2
    assert encoded[2].content == [False, True, True, True, True, False]
    assert states.truncated == 2
    # RoBERTa's 24 positions begin at 2, after the padding index
    assert SentenceStates.open(folder).max_length == 22
    at_most = SentenceStates.open(folder)
    assert at_most.pooled(at_most.encode([" ".join(WORDS * 4)])).isfinite().all()
    assert SentenceStates.open(saved(tmp_path / "bert", "bert", AutoModel)).max_length == 24


def test_a_sentence_of_special_tokens_alone_is_named(tmp_path: Path) -> None:
    states = SentenceStates.open(saved(tmp_path, "bert", AutoModel))
    with pytest.raises(ModelError, match=r"^sentence 2, ' \\u3000': has special tokens only; leave it out$"):
        states.encode(["one", " \u3000"])


def test_models_that_cannot_be_pooled_or_opened_are_refused(tmp_path: Path) -> None:
    decoder = saved(tmp_path / "decoder", "llama", AutoModelForCausalLM)
    with pytest.raises(
        ModelError, match='LlamaModel: a decoder\'s first token attends to no other; use pooling "mean"'
    ):
        SentenceStates.open(decoder, pooling="first")
    both = tmp_path / "both"
    AutoModel.from_config(AutoConfig.for_model("bart", d_model=16, encoder_layers=1, decoder_layers=1)).save_pretrained(
        both
    )
    tokenizer(None).save_pretrained(both)
    with pytest.raises(ModelError, match="a bart model has an encoder and a decoder; take one with either"):
        SentenceStates.open(both)
    for file in decoder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="no usable tokenizer"):
        SentenceStates.open(decoder)


def test_weights_of_all_layers_are_required_and_of_the_head_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "whole", "xlm-roberta", AutoModelForMaskedLM)
    weights = load_file(folder / "model.safetensors")
    capfd.readouterr()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    SentenceStates.open(folder)  # the file has no pooler, and a head that is not used
    assert torch.equal(torch.get_rng_state(), before)
    assert "LOAD REPORT" not in "".join(capfd.readouterr())

    def changed(name: str, tensors: dict[str, Tensor]) -> Path:
        shutil.copytree(folder, tmp_path / name)
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        return tmp_path / name

    key = "roberta.encoder.layer.1.output.dense.weight"
    lacking = changed("lacking", {name: tensor for name, tensor in weights.items() if name != key})
    with pytest.raises(ModelError, match=r"1 missing weights for XLMRobertaModel: encoder\.layer\.1\.output\.dense"):
        SentenceStates.open(lacking)
    extra = changed("extra", {**weights, "roberta.encoder.layer.0.mixup_ratio.w": torch.ones(1)})
    with pytest.raises(ModelError, match=r"1 unexpected weights for XLMRobertaModel: .*mixup_ratio\.w"):
        SentenceStates.open(extra)
    misshapen = changed("misshapen", {**weights, key: torch.ones(16, 31)})
    with pytest.raises(ModelError, match=r"1 mismatched weights for XLMRobertaModel: .*output\.dense"):
        SentenceStates.open(misshapen)
