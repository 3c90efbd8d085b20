"""A model directory is checked before a run, by file headers: one line per mistake, with the file and what is right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import run_values, write_task_data
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from modeling.errors import ModelError
from modeling.loading import build_model, load_pretrained, load_weights
from modeling.weights import weight_check
from modeling.weights.weight_check import check_directory
from training.check import check_run
from training.checks.front import check_model_files, check_starting_model
from training.config import RunConfig
from training.errors import ConfigError
from training.prefetch import open_all
from training.run_file import validate
from training.run_folder.prepare import prepare

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
UP = "model.layers.1.mlp.up_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, prepared_run: Any) -> Path:
    """A Llama with the tiny run's tokenizer, in one file and, in `shards`, in several."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(prepared_run.prepared.tokenizer_dir)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=400, **SIZES))
    for name, size in (("one", "1GB"), ("shards", "30KB")):
        model.save_pretrained(folder / name, max_shard_size=size)
        tokenizer.save_pretrained(folder / name)
    return folder


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Change:
    def rewrite(directory: Path) -> None:
        held = load_file(directory / "model.safetensors")
        change(held)
        save_file(held, directory / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def config(**changes: Any) -> Change:
    def rewrite(directory: Path) -> None:
        values = json.loads((directory / "config.json").read_text()) | changes
        kept = {key: value for key, value in values.items() if value is not None}
        (directory / "config.json").write_text(json.dumps(kept))

    return rewrite


def file(name: str, content: str | bytes | None) -> Change:
    """Replace the content of a file; None: delete it."""

    def rewrite(directory: Path) -> None:
        (path,) = directory.glob(name)
        path.unlink()
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return rewrite


def cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def binary(directory: Path) -> None:
    torch.save({}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def index(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    values["weight_map"]["model.more.weight"] = "model-00001-of-00005.safetensors"
    path.write_text(json.dumps(values))


def moved(directory: Path) -> None:
    """The index names another file for a weight than the one that holds it."""
    path = directory / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    places = values["weight_map"]
    places[UP] = next(name for name in places.values() if name != places[UP])
    path.write_text(json.dumps(values))


def adapter(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    (directory / "adapter_config.json").write_text("{}")


def misshapen(directory: Path) -> None:
    """A header with a shape that does not match its byte offsets."""
    path = directory / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [16]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


MISTAKES: list[tuple[str, Change, str]] = [
    ("one", binary, r"D: only pytorch_model\.bin weights .*; convert once with AutoModelForCausalLM.*save_pretrained"),
    ("one", adapter, r"D: a LoRA adapter, not a model; merge it once"),
    (
        "shards",
        file("model-00002*", None),
        r"D/model\.safetensors\.index\.json: names 5 files, 1 of them missing: model-00002",
    ),
    (
        "shards",
        index,
        r"D/model\.safetensors\.index\.json: lists model\.more\.weight in model-00001.*does not contain it",
    ),
    (
        "shards",
        moved,
        rf"D/model\.safetensors\.index\.json: lists {UP} in model-0000.*, which does not contain it; copy both",
    ),
    ("shards", file("model-00002*", POINTER), r"D/model-00002.*: a git-LFS pointer, .*`git lfs pull`"),
    ("one", file("model.safetensors", POINTER), r"D/model\.safetensors: a git-LFS pointer"),
    ("one", file("tokenizer.json", POINTER), r"D/tokenizer\.json: a git-LFS pointer"),
    ("one", file("config.json", POINTER), r"D/config\.json: a git-LFS pointer"),
    ("one", file("model.safetensors", b""), r"D/model\.safetensors: empty; copy it again"),
    (
        "one",
        cut,
        r"D/model\.safetensors: \d+ bytes long, but its header describes \d+: cut off or damaged; copy it again",
    ),
    ("one", misshapen, r"D/model\.safetensors: not a readable safetensors file \(.*\); copy it again"),
    (
        "one",
        tensors(lambda held: held.pop(UP)),
        rf"D: 1 missing weights for LlamaForCausalLM: {UP}; copy the whole model",
    ),
    (
        "one",
        tensors(lambda held: held.pop("lm_head.weight")),
        r"D: 1 missing .*: lm_head\.weight; set tie_word_embeddings to true",
    ),
    (
        "one",
        tensors(lambda held: held.update(more=torch.ones(2))),
        r"D: 1 unexpected .*: more; config\.json must be the one of these",
    ),
    (
        "one",
        tensors(lambda held: held.update({UP: torch.ones(3)})),
        r"D: 1 wrongly shaped .*\(F32 \[3\] stored, \[64, 32\] wanted\) in model",
    ),
    (
        "one",
        tensors(lambda held: held.update({UP: held[UP].to(torch.int8)})),
        r"D: 1 wrongly typed .*I8.*; they are quantised; take",
    ),
    ("one", tensors(lambda held: held.update({UP: held[UP].to(torch.float8_e4m3fn)})), r"D: 1 wrongly typed .*F8_E4M3"),
    (
        "one",
        config(tie_word_embeddings=True),
        r"D: lm_head\.weight and .* differ, but config\.json ties them; set .* to false",
    ),
    ("one", config(quantization_config={"quant_method": "gptq", "bits": 4}), r"D: the weights are quantised; take"),
    (
        "one",
        config(vocab_size=500),
        r"D: 2 wrongly shaped .*lm_head\.weight \(F32 \[400, 32\] stored, \[500, 32\] wanted\)",
    ),
    ("one", config(model_type="lama"), r"D/config\.json: model_type is 'lama', .*; did you mean 'llama'\?"),
    ("one", config(model_type=None), r"D/config\.json: model_type is None, .*; write the model's own"),
    (
        "one",
        config(model_type="mistral"),
        r"D/config\.json: model_type 'mistral' is not that of a LlamaForCausalLM.*must be 'llama'",
    ),
    (
        "one",
        config(model_type="gpt2", architectures=None),
        r"D: the weights there are not a GPT2LMHeadModel's: .*model_type 'gpt2'",
    ),
    ("one", file("config.json", None), r"D/config\.json: missing; copy it"),
    ("one", file("config.json", "{"), r"D/config\.json: not a model's config in JSON"),
    ("one", file("tokenizer.json", "{"), r"D: no usable tokenizer"),
]


def begin_training(config: RunConfig) -> None:
    """What `crosslift train` does before any rank starts."""
    check_model_files(config)
    check_starting_model(config.model, config.data, config.objective, prepare(config))


def checked(directory: Path, tmp_path: Path, **changes: Any) -> None:
    values = run_values(tmp_path, tmp_path / "run", **{"model": {"path": str(directory)}, "tokenizer": {}, **changes})
    check_model_files(validate(values, "test"))


@pytest.mark.parametrize(("kind", "change", "message"), MISTAKES)
def test_a_damaged_or_unsuitable_model_is_refused_in_one_line(
    made: Path, tmp_path: Path, kind: str, change: Change, message: str
) -> None:
    directory = tmp_path / "D"
    shutil.copytree(made / kind, directory)
    change(directory)
    with pytest.raises(ModelError, match=rf"^{tmp_path}/{message}") as refused:
        checked(directory, tmp_path)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_status == 2
    assert not (tmp_path / "run").exists()


def test_each_kind_of_mistake_has_one_line(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "one", tmp_path / "D")
    config(num_hidden_layers=1, intermediate_size=80, attention_bias=True)(tmp_path / "D")
    with pytest.raises(ModelError) as refused:
        checked(tmp_path / "D", tmp_path)
    lines = str(refused.value).splitlines()
    assert [line.split(": ")[1].split(" weights")[0] for line in lines] == [
        "4 missing",
        "9 unexpected",
        "3 wrongly shaped",
    ]


def test_no_weight_is_read(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Headers:
        """A safetensors file that cannot read tensors."""

        def __init__(self, *arguments: Any, **options: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(weight_check, "safe_open", Headers)
    for kind in ("one", "shards"):
        checked(made / kind, tmp_path)
        assert all(parameter.is_meta for parameter in check_directory(made / kind, "causal-lm").parameters())


def test_a_tokenizer_larger_than_the_embeddings_or_missing_is_refused(made: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=300, **SIZES)).save_pretrained(small)
    with pytest.raises(ConfigError, match=rf"^{small}: holds no tokenizer; copy its files, or name its folder in tok"):
        checked(small, tmp_path)
    with pytest.raises(ConfigError, match=rf"^tokenizer {made}/one: 400 tokens, but the model embeds only 300; "):
        checked(small, tmp_path, tokenizer={"path": str(made / "one")})
    with pytest.raises(ConfigError, match=r"^tokenizer\.train\.vocab_size: 301, but the model embeds only 300 tokens"):
        checked(small, tmp_path, tokenizer={"train": {"vocab_size": 301}})


def test_the_largest_token_id_counts_if_ids_have_gaps(made: Path, tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 400}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path / "T")
    with pytest.raises(ConfigError, match=rf"^tokenizer {tmp_path}/T: 401 tokens, but the model embeds only 400; "):
        checked(made / "one", tmp_path, tokenizer={"path": str(tmp_path / "T")})


def test_a_damaged_base_model_of_adapters_is_refused(made: Path, tmp_path: Path) -> None:
    lora = {"model": {"path": str(tmp_path / "D"), "lora": {"rank": 2, "alpha": 2}}}
    shutil.copytree(made / "one", tmp_path / "D")
    checked(tmp_path / "D", tmp_path, **lora)
    cut(tmp_path / "D")
    with pytest.raises(ModelError, match="cut off or damaged"):
        checked(tmp_path / "D", tmp_path, **lora)


def test_check_train_and_prefetch_refuse_before_anything_is_written(made: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "one", tmp_path / "D")
    cut(tmp_path / "D")
    values = run_values(corpus, tmp_path / "run", model={"path": str(tmp_path / "D")}, tokenizer={})
    for begin in (lambda config: list(check_run(config)), begin_training, open_all):
        with pytest.raises(ModelError, match="cut off or damaged"):
            begin(validate(values, "test"))
        assert not (tmp_path / "run").exists()


ENCODER = {**SIZES, "vocab_size": 150, "max_position_embeddings": 130, "pad_token_id": 1}


@pytest.mark.parametrize("pretrained", [AutoModel, AutoModelForMaskedLM])
def test_an_encoder_may_lack_its_new_head_and_nothing_else(tmp_path: Path, pretrained: Any) -> None:
    pretrained.from_config(AutoConfig.for_model("xlm-roberta", **ENCODER)).save_pretrained(tmp_path)
    for architecture, labels in (("token-classification", ["a", "b", "c"]), ("question-answering", [])):
        check_directory(tmp_path, architecture, labels)  # type: ignore[arg-type]
    if pretrained is AutoModel:
        with pytest.raises(ModelError, match=r"missing weights for XLMRobertaForMaskedLM: lm_head"):
            check_directory(tmp_path, "masked-lm", [])
    key = next(key for key in load_file(tmp_path / "model.safetensors") if key.endswith("layer.1.output.dense.weight"))
    tensors(lambda held: held.pop(key))(tmp_path)
    with pytest.raises(ModelError, match=r"1 missing weights for .*: roberta\.encoder\.layer\.1\.output\.dense"):
        check_directory(tmp_path, "token-classification", ["a", "b", "c"])


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("nomic_bert", r"the layers of nomic_bert have no attention\.self\.query; take one of"),
        ("gemma", "is a decoder; "),
    ],
)
def test_models_that_no_task_can_start_from_are_refused_by_their_kind(
    tmp_path: Path, model_type: str, message: str
) -> None:
    """The error is about its layers or its kind, not about weights stored in another layout."""
    auto = AutoModelForMaskedLM if model_type == "nomic_bert" else AutoModelForCausalLM
    auto.from_config(AutoConfig.for_model(model_type, **{**ENCODER, "num_key_value_heads": 4})).save_pretrained(
        tmp_path
    )
    with pytest.raises(ModelError, match=message):
        check_directory(tmp_path, "token-classification", ["a", "b"])


def test_obsolete_buffers_are_ignored(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "one", tmp_path / "D")
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors(lambda held: held.update({old: torch.ones(4)}))(tmp_path / "D")
    checked(tmp_path / "D", tmp_path)


def test_the_encoder_of_a_run_is_checked_before_its_head_is_made(tmp_path: Path) -> None:
    AutoModelForMaskedLM.from_config(AutoConfig.for_model("xlm-roberta", **ENCODER)).save_pretrained(tmp_path / "D")
    task = {"data.task": {"kind": "tagging", "labels": ["WORD", "NUMBER"]}, "objective": {"name": "finetune"}}
    columns = {name: name for name in ("id", "language", "words", "tags")}
    task |= {"data.sources": [{"name": "a", "files": "*.jsonl", "columns": columns}], "data.mixture": {}}
    task |= {"model": {"path": str(tmp_path / "D")}, "tokenizer": {"train": {"vocab_size": 150, "style": "encoder"}}}
    values = run_values(write_task_data(tmp_path / "data"), tmp_path / "run", **task)
    check_model_files(validate(values, "test"))  # it has no head for the task yet
    cut(tmp_path / "D")
    with pytest.raises(ModelError, match="cut off or damaged"):
        begin_training(validate(values, "test"))


@pytest.mark.parametrize(("value", "place"), [(float("nan"), 0), (float("inf"), 700), (float("-inf"), -1)])
def test_a_weight_that_is_not_finite_is_named_with_its_file_when_it_is_read(
    made: Path, tmp_path: Path, value: float, place: int
) -> None:
    def damage(held: dict[str, Tensor]) -> None:
        held[UP].view(-1)[place] = value

    shutil.copytree(made / "one", tmp_path / "D")
    checked(tmp_path / "D", tmp_path)
    tensors(damage)(tmp_path / "D")
    model = build_model(tmp_path / "D", attention="sdpa", dtype=torch.float32, gradient_checkpointing=False)
    message = rf"{UP}: 1 of its 2048 values are not finite; copy the model again$"
    with pytest.raises(ModelError, match=rf"^{tmp_path}/D/model\.safetensors: {message}"):
        load_weights(model, tmp_path / "D", lambda parameter, read: read() if read else None, is_reader=True)
    with pytest.raises(ModelError, match=rf"^{tmp_path}/D: {message}"):
        load_pretrained(tmp_path / "D", torch.float32, "sdpa", "cpu")
