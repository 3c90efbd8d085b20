"""Task models: encoder weights are copied bit for bit, heads depend on the seed, misfits are refused."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from modeling.errors import ModelError
from modeling.loading import build_model, load_config, load_pretrained, load_weights
from modeling.tasks.encoders import TASK_ARCHITECTURES, load_task_model, write_task_start
from modeling.weights.initial_model import write_initial_model

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
LABELS = {"classification": ["no", "yes", "maybe"], "tagging": ["A", "B"], "qa": [], "text": []}
IDS = torch.arange(4, 16).view(2, 6)


def pretrained(directory: Path, name: str = "xlm-roberta", auto: Any = AutoModelForMaskedLM, **changes: Any) -> Path:
    torch.manual_seed(7)
    model: PreTrainedModel = auto.from_config(AutoConfig.for_model(name, **{**SIZES, **changes}))
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "sentencepiece.bpe.model").write_bytes(b"pieces")
    (directory / "README.md").write_text("not copied")
    return directory


def plain_copy(parameter: nn.Parameter, read: Callable[[], Tensor] | None) -> None:
    assert read is not None
    with torch.no_grad():
        parameter.copy_(read())


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return directory


def encoder_weights(directory: Path) -> dict[str, Tensor]:
    stored = load_file(directory / "model.safetensors")
    return {key: value for key, value in stored.items() if ".encoder." in key or ".embeddings." in key}


@pytest.mark.parametrize("kind", list(TASK_ARCHITECTURES))
@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "camembert", "electra"])
def test_encoder_weights_are_unchanged_and_the_task_model_loads(tmp_path: Path, name: str, kind: str) -> None:
    source = pretrained(tmp_path / "source", name)
    labels = LABELS[kind]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    start = write_task_start(source, kind, labels, tmp_path / "start", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    kept = encoder_weights(source)
    assert len(kept) > 20
    written = encoder_weights(start)
    assert kept.keys() == written.keys()
    assert all(torch.equal(written[key], value) for key, value in kept.items())
    assert sorted(file.name for file in start.iterdir()) == [
        "config.json", "model.safetensors", "sentencepiece.bpe.model", "tokenizer.json"
    ]  # fmt: skip

    whole = load_task_model(start, kind, labels, torch.float32, "eager", "cpu")
    model = build_model(
        start, attention="eager", dtype=torch.float32, gradient_checkpointing=kind != "text",
        architecture=TASK_ARCHITECTURES[kind],
    )  # fmt: skip
    assert model.is_gradient_checkpointing == (kind != "text")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    load_weights(model, start, plain_copy, is_reader=True)
    output, expected = model.eval()(input_ids=IDS), whole(input_ids=IDS)
    assert len(expected.to_tuple()) == (2 if kind == "qa" else 1)
    for ours, theirs in zip(output.to_tuple(), expected.to_tuple(), strict=True):
        assert torch.equal(ours, theirs)
    if labels:
        assert expected.logits.shape[-1] == len(labels)
        assert list(whole.config.id2label.values()) == labels
    if kind == "text":
        original = AutoModelForMaskedLM.from_pretrained(source, attn_implementation="eager").eval()
        assert torch.equal(original(input_ids=IDS).logits, expected.logits)


def head(directory: Path) -> dict[str, Tensor]:
    stored = load_file(directory / "model.safetensors")
    return {key: value for key, value in stored.items() if key not in encoder_weights(directory)}


@pytest.mark.parametrize("name", ["bert", "xlm-roberta"])
def test_the_head_depends_on_the_seed_and_not_on_the_encoder(tmp_path: Path, name: str) -> None:
    one = pretrained(tmp_path / "one", name)
    other = change_tensors(pretrained(tmp_path / "other", name), lambda tensors: [t.add_(1) for t in tensors.values()])
    heads = {}
    for source in (one, other):
        for seed in (1, 2):
            torch.manual_seed(seed + 10 * len(heads))
            start = write_task_start(
                source, "classification", LABELS["classification"], tmp_path / f"{source.name}{seed}", seed
            )
            heads[source.name, seed] = head(start)
    assert len(heads["one", 1]) == 4
    for key, value in heads["one", 1].items():
        assert torch.equal(value, heads["other", 1][key])
        if key.endswith("bias"):
            assert (value == 0).all()
        else:
            assert not torch.equal(value, heads["one", 2][key])
            assert 0.01 < value.std() < 0.03  # initializer_range 0.02


def test_checkpoints_with_pretraining_heads_and_pooler(tmp_path: Path) -> None:
    """As in BERT's release: the pooler is kept if the task uses it, the pretraining heads are dropped."""
    source = pretrained(tmp_path / "source", "bert", AutoModelForPreTraining)
    pooler = load_file(source / "model.safetensors")["bert.pooler.dense.weight"]
    start = write_task_start(source, "classification", ["a", "b"], tmp_path / "classification", 0)
    assert torch.equal(head(start)["bert.pooler.dense.weight"], pooler)
    assert set(head(write_task_start(source, "tagging", ["a", "b"], tmp_path / "tagging", 0))) == {
        "classifier.weight", "classifier.bias"
    }  # fmt: skip
    old = change_tensors(source, lambda t: t.update({"bert.embeddings.position_ids": torch.arange(32)[None]}))
    write_task_start(old, "qa", [], tmp_path / "qa", 0)


def test_transformers_logs_no_warning_about_checked_weights(tmp_path: Path) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        write_task_start(pretrained(tmp_path / "source"), "tagging", ["a", "b"], tmp_path / "start", 0)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert [record.getMessage() for record in records] == []


def test_the_stored_dtype_is_kept(tmp_path: Path) -> None:
    source = pretrained(tmp_path / "source", dtype=torch.float16)
    start = write_task_start(source, "tagging", ["a", "b"], tmp_path / "start", 0)
    assert {value.dtype for value in load_file(start / "model.safetensors").values()} == {torch.float16}


def test_missing_unexpected_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    key = "roberta.encoder.layer.1.output.dense.weight"
    cases: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any]]] = {
        f"1 missing weights: {key}": ("tagging", lambda t: t.pop(key)),
        "1 unexpected weights: roberta.extra.weight": (
            "qa",
            lambda t: t.update({"roberta.extra.weight": torch.ones(2)}),
        ),
        "1 unexpected weights: qa_outputs.weight": (
            "tagging",
            lambda t: t.update({"qa_outputs.weight": torch.ones(2)}),
        ),
        f"1 weights of another shape than the task's: {key}": ("qa", lambda t: t.update({key: torch.ones(3, 3)})),
        "1 missing weights: lm_head.dense.weight": ("text", lambda t: t.pop("lm_head.dense.weight")),
    }
    for number, (message, (kind, change)) in enumerate(cases.items()):
        source = change_tensors(pretrained(tmp_path / str(number)), change)
        with pytest.raises(ModelError, match=message) as caught:
            write_task_start(source, kind, LABELS[kind], tmp_path / "start", 0)
        assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if "start" in path.name]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    key = "roberta.encoder.layer.1.output.dense.weight"
    source = change_tensors(pretrained(tmp_path / "source"), lambda t: t[key][3, 5].fill_(value))
    with pytest.raises(ModelError, match=rf"^{source}: {key}: 1 of its 384 values are not finite; copy"):
        write_task_start(source, "tagging", ["a", "b"], tmp_path / "start", 0)
    assert not (tmp_path / "start").exists()


def test_models_that_x_mixup_cannot_mix_are_refused_before_their_weights_are_read(tmp_path: Path) -> None:
    for name, message in {
        "llama": "a llama model is a decoder; take an encoder",
        "xlm-roberta-xl": "xlm-roberta-xl is pre-LN",
        "deberta-v2": "the layers of deberta-v2 have no attention.self.query",
        "vit": "a vit model has no token-classification head",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": name, "num_hidden_layers": 2}))
        with pytest.raises(ModelError, match=message):
            write_task_start(tmp_path / name, "tagging", ["a", "b"], tmp_path / "start", 0)
    decoder = pretrained(tmp_path / "decoder", "bert", AutoModelForCausalLM, is_decoder=True)
    with pytest.raises(ModelError, match="a bert model is a decoder"):
        write_task_start(decoder, "tagging", ["a", "b"], tmp_path / "start", 0)


def test_a_model_of_the_task_keeps_its_head_if_its_labels_are_the_same(tmp_path: Path) -> None:
    source = pretrained(tmp_path / "source")
    first = write_task_start(source, "classification", LABELS["classification"], tmp_path / "first", 1)
    again = write_task_start(first, "classification", LABELS["classification"], tmp_path / "again", 2)
    assert len(head(first)) == 4
    assert all(torch.equal(value, head(again)[key]) for key, value in head(first).items())
    for labels, message in (
        (["yes", "no", "maybe"], "its head has the labels no, yes, maybe; the task's are yes, no, maybe"),
        (["no", "yes"], "2 weights of another shape than the task's: classifier.out_proj.bias"),
    ):
        with pytest.raises(ModelError, match=message):
            write_task_start(first, "classification", labels, tmp_path / "other", 1)
    assert not (tmp_path / "other").exists()
    load_task_model(first, "classification", LABELS["classification"], torch.float32, "sdpa", "cpu")
    with pytest.raises(ModelError, match="its head has the labels no, yes, maybe"):
        load_task_model(first, "classification", ["yes", "no", "maybe"], torch.float32, "sdpa", "cpu")


def test_labels_that_do_not_fit_the_task_are_refused(tmp_path: Path) -> None:
    source = pretrained(tmp_path / "source")
    for kind, labels, message in [
        ("classification", ["one"], "needs two or more different ones"),
        ("tagging", ["a", "a"], "needs two or more different ones"),
        ("qa", ["a", "b"], "a qa task has none"),
        ("ranking", ["a", "b"], "'ranking' is not one of classification, tagging, qa, text"),
    ]:
        with pytest.raises(ModelError, match=message):
            write_task_start(source, kind, labels, tmp_path / "start", 0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *map(str, range(25))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta"])
def test_an_initial_masked_language_model_is_written_and_loaded(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    config = {"model_type": name, **SIZES}
    made = write_initial_model(config, tokenizer, tmp_path / "made", 1, architecture="masked-lm")
    decoder = write_initial_model({**config, "is_decoder": True}, tokenizer, tmp_path / "decoding", 1)
    assert load_config(decoder).is_decoder  # with is_decoder it is a causal LM too
    with pytest.raises(ModelError, match=f"a {name} model is an encoder, not a decoder language model"):
        write_initial_model(config, tokenizer, tmp_path / "decoder", 1)
    model = load_pretrained(made, torch.float32, "sdpa", "cpu", architecture="masked-lm")
    assert type(model).__name__.endswith("ForMaskedLM")
    assert (model.config.pad_token_id, model.config.vocab_size) == (1, 40)
    empty = build_model(
        made, attention="sdpa", dtype=torch.float32, gradient_checkpointing=False, architecture="masked-lm"
    )
    load_weights(empty, made, plain_copy, is_reader=True)
    assert torch.equal(empty.eval()(input_ids=IDS).logits, model(input_ids=IDS).logits)
    start = write_task_start(made, "classification", ["a", "b"], tmp_path / "start", 1)
    assert (start / "tokenizer.json").read_bytes() == (made / "tokenizer.json").read_bytes()
    loaded = AutoModelForSequenceClassification.from_pretrained(start)
    assert loaded.config.pad_token_id == 1


def test_an_architecture_that_a_model_type_lacks_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "max_position_embeddings"}
    with pytest.raises(ModelError, match="a llama model has no masked-lm head"):
        write_initial_model({"model_type": "llama", **sizes}, tokenizer, tmp_path / "made", 1, architecture="masked-lm")
    source = pretrained(tmp_path / "source", "distilbert")
    with pytest.raises(ModelError, match="source: a distilbert model is not a decoder language model"):
        load_config(source)
    with pytest.raises(ModelError, match="4 missing weights for DistilBert"):
        load_pretrained(source, torch.float32, "sdpa", "cpu", architecture="sequence-classification")
