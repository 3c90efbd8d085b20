"""Weights are loaded tensor by tensor as from_pretrained loads them, or refused; initial models are written."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from modeling.errors import ModelError
from modeling.loading import (
    build_model,
    load_pretrained,
    load_weights,
    resolve_attention,
    resolve_directory,
)
from modeling.weights.initial_model import write_initial_model
from modeling.weights.weight_files import directory_hash

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LLAMA = {"model_type": "llama", **SIZES, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", "<unk>", *map(str, range(28))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_model(directory: Path, model_type: str, native_format: bool = True, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, "vocab_size": 32, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):  # a router's bias, which is stored: one that is not loaded changes the logits
            buffer.normal_()
    model.save_pretrained(directory, save_original_format=native_format is False)
    return model


def plain_copy(parameter: nn.Parameter, read: Callable[[], Tensor] | None) -> None:
    assert read is not None
    with torch.no_grad():
        parameter.copy_(read())


def filled(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = build_model(directory, attention="auto", dtype=dtype, gradient_checkpointing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # a weight that is not written gives NaN logits
    load_weights(model, directory, plain_copy, is_reader=True)
    return model.eval()


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 2, "head_dim": 8}),
        ("gpt_neox", {}),
        ("bloom", {"n_head": 4}),
        ("gpt2", {"n_positions": 64}),
        ("gemma3_text", {"head_dim": 8, "num_key_value_heads": 2}),
        ("deepseek_v3", {"n_routed_experts": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4}),
    ],
)
def test_loaded_model_equals_from_pretrained(tmp_path: Path, model_type: str, changes: dict) -> None:
    save_model(tmp_path, model_type, **changes)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = torch.arange(3, 13)[None]
    model = filled(tmp_path)
    assert model.config.use_cache is False
    model.set_attn_implementation("eager")
    assert torch.equal(model(ids).logits, expected(ids).logits)
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    whole = load_pretrained(tmp_path, torch.float32, "eager", "cpu")
    assert torch.equal(whole(ids).logits, expected(ids).logits)


def test_shards_other_dtypes_and_name_prefixes_are_loaded(tmp_path: Path) -> None:
    model = save_model(tmp_path / "one", "llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    model.model.save_pretrained(tmp_path / "base")  # names of a base model; the head is tied to its embedding
    for name in ("many", "base"):
        for key, tensor in filled(tmp_path / name).state_dict().items():
            assert torch.equal(tensor, model.state_dict()[key])
    half = filled(tmp_path / "many", torch.bfloat16)
    assert torch.equal(half.lm_head.weight, model.lm_head.weight.bfloat16())


def test_every_rank_writes_the_same_parameters_and_only_the_reader_reads(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3", tie_word_embeddings=True, head_dim=8)
    orders: list[list[str]] = []
    for is_reader in (True, False):
        model = build_model(tmp_path, attention="sdpa", dtype=torch.float32, gradient_checkpointing=True)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        order: list[str] = []

        def write(
            parameter: nn.Parameter,
            read: Callable[[], Tensor] | None,
            order: list[str] = order,
            names: dict[int, str] = names,
            is_reader: bool = is_reader,
        ) -> None:
            assert (read is not None) == is_reader
            order.append(names[id(parameter)])

        load_weights(model, tmp_path, write, is_reader)
        assert model.is_gradient_checkpointing
        orders.append(order)
    assert orders[0] == orders[1] == list(names.values())
    assert len(set(orders[0])) == len(orders[0])


def test_partitioned_parameters_are_checked_by_their_whole_shape(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    model = build_model(tmp_path, attention="sdpa", dtype=torch.float32, gradient_checkpointing=False)
    for parameter in model.parameters():  # as under ZeRO-3
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    load_weights(model, tmp_path, lambda parameter, read: None, is_reader=False)


def test_construction_context_is_open_while_modules_are_made(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    made: list[nn.Module] = []

    @contextmanager
    def construction() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            original = nn.Module.__init__
            patch.setattr(
                nn.Module, "__init__", lambda self, *args, **kw: made.append(self) or original(self, *args, **kw)
            )
            yield

    model = build_model(
        tmp_path,
        attention="sdpa",
        dtype=torch.float32,
        gradient_checkpointing=False,
        construction=construction(),
    )
    assert {type(module) for module in made} >= {type(module) for module in model.modules()}


def test_construction_that_rounds_rotary_frequencies_is_refused(tmp_path: Path) -> None:
    """What zero.Init alone does in a bf16 run, without an error."""
    save_model(tmp_path, "llama")

    @contextmanager
    def construction() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            original = nn.Module.register_buffer
            patch.setattr(
                nn.Module,
                "register_buffer",
                lambda self, name, value, *args, **kw: original(self, name, value.bfloat16(), *args, **kw),
            )
            yield

    with pytest.raises(ModelError, match=r"inv_freq: made in torch\.bfloat16"):
        build_model(
            tmp_path,
            attention="sdpa",
            dtype=torch.bfloat16,
            gradient_checkpointing=False,
            construction=construction(),
        )


def test_weights_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    cases: dict[str, Callable[[dict[str, Tensor]], Any]] = {
        r"1 missing weights for LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj": lambda t: t.pop(key),
        r"1 unexpected weights .*: model\.extra": lambda t: t.update({"model.extra": torch.ones(2)}),
        r"1 wrongly shaped .*up_proj\.weight \(F32 \[3, 3\] stored, \[48, 32\] wanted\)": lambda t: t.update(
            {key: torch.ones(3, 3)}
        ),
        r"wrongly typed .*up_proj\.weight \(I8": lambda t: t.update({key: t[key].to(torch.int8)}),
        r"1 missing .*: lm_head\.weight": lambda t: t.pop("lm_head.weight"),
    }
    for number, (message, change) in enumerate(cases.items()):
        directory = tmp_path / str(number)
        save_model(directory, "llama")
        change_tensors(directory, change)
        for is_reader in (True, False):
            model = build_model(directory, attention="sdpa", dtype=torch.float32, gradient_checkpointing=False)
            with pytest.raises(ModelError, match=message):
                load_weights(model, directory, plain_copy, is_reader)
        if "I8" not in message:
            with pytest.raises(ModelError, match=r"1 (missing|unexpected|mismatched) weights"):
                load_pretrained(directory, torch.float32, "sdpa", "cpu")


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", tie_word_embeddings=True)
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ModelError, match=r"differ, but config\.json ties them"):
        filled(tmp_path)


def test_damaged_missing_and_unsupported_weight_files_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "cut", "llama")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    model = save_model(tmp_path / "shard", "llama")
    model.save_pretrained(tmp_path / "shard", max_shard_size="10KB")
    (tmp_path / "shard" / "model.safetensors").unlink()
    next((tmp_path / "shard").glob("model-00002*")).unlink()
    save_model(tmp_path / "bin", "llama")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "bin" / "pytorch_model.bin")
    save_model(tmp_path / "none", "llama")
    (tmp_path / "none" / "model.safetensors").unlink()
    for name, message in {
        "cut": "cut off or damaged",
        "shard": r"1 of them missing: model-00002",
        "bin": r"pytorch_model\.bin.*save_pretrained",
        "none": r"no model\.safetensors",
    }.items():
        for load in (
            filled,
            lambda path: load_pretrained(path, torch.float32, "sdpa", "cpu"),
        ):
            with pytest.raises(ModelError, match=message) as caught:
                load(tmp_path / name)
            assert "\n" not in str(caught.value)


def test_layouts_that_need_conversion_are_refused_with_the_conversion(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 4, "num_key_value_heads": 2}
    model = save_model(
        tmp_path / "hub", "mixtral", native_format=False, **sizes
    )  # as on the hub: one tensor per expert
    with pytest.raises(ModelError, match="save_original_format=False"):
        filled(tmp_path / "hub")
    AutoModelForCausalLM.from_pretrained(tmp_path / "hub").save_pretrained(tmp_path / "new", save_original_format=False)
    for key, tensor in filled(tmp_path / "new").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key])


def test_config_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError):
        build_model(tmp_path, attention="auto", dtype=torch.float32, gradient_checkpointing=False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match="not a decoder"):
        build_model(tmp_path, attention="auto", dtype=torch.float32, gradient_checkpointing=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/no-such-model", "not a name"):
        with pytest.raises(ModelError, match="not a local directory, and the download from the hub failed") as caught:
            resolve_directory(name)
        assert "\n" not in str(caught.value)


def test_attention_names_are_resolved_or_refused() -> None:
    assert resolve_attention("auto") == "sdpa" or torch.cuda.is_available()
    assert resolve_attention("auto", AutoConfig.for_model("bloom")) == "eager"
    with pytest.raises(ModelError, match="BloomForCausalLM has no sdpa"):
        resolve_attention("sdpa", AutoConfig.for_model("bloom"))
    with pytest.raises(ModelError, match="not one of"):
        resolve_attention("spda")


def test_initial_model_depends_on_config_and_seed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        write_initial_model(LLAMA, tokenizer, tmp_path / name, seed)
    assert torch.equal(before, torch.get_rng_state())
    a, b, c = (directory_hash(tmp_path / name) for name in "abc")
    assert a == b != c
    model = filled(tmp_path / "a")
    assert abs(float(model.get_input_embeddings().weight.detach().std()) - 0.02) < 0.002
    assert (model.config.vocab_size, model.config.eos_token_id, model.config.pad_token_id) == (32, 1, 2)
    assert AutoTokenizer.from_pretrained(tmp_path / "a")("3 4").input_ids == tokenizer("3 4").input_ids
    for name, config, seed in (("d", LLAMA, 3), ("e", {**LLAMA, "hidden_size": 64}, 1)):
        assert directory_hash(write_initial_model(config, tokenizer, tmp_path / name, seed)) != a
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d", "e"]


def test_the_initial_config_may_be_a_file_and_its_mistakes_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps({**LLAMA, "rope_theta": 500.0, "vocab_size": 64}))
    model = filled(write_initial_model(file, tokenizer, tmp_path / "model", 0))
    assert model.config.rope_parameters["rope_theta"] == 500.0
    assert model.get_input_embeddings().weight.shape == (64, 32)
    experts = {**LLAMA, "model_type": "mixtral", "num_local_experts": 2}
    assert filled(write_initial_model(experts, tokenizer, tmp_path / "experts", 0)).config.num_local_experts == 2
    named = write_initial_model({**LLAMA, "crosslift_layers": "layers"}, tokenizer, tmp_path / "named", 0)
    assert filled(named).config.crosslift_layers == "layers"
    for change, message in [
        ({"hiden_size": 8}, "hiden_size: not a key of LlamaConfig; the nearest is 'hidden_size'"),
        ({"model_type": "lama"}, "'lama' is not a model type of transformers; the nearest is 'llama'"),
        ({"vocab_size": 5}, "vocab_size: 5 is below the tokenizer's 32 tokens"),
        ({"num_attention_heads": 5}, "LlamaConfig: .* not a multiple of the number of attention heads"),
    ]:
        with pytest.raises(ModelError, match=message):
            write_initial_model({**LLAMA, **change}, tokenizer, tmp_path / "other", 0)
    assert not (tmp_path / "other").exists()


def test_directory_hash_depends_on_weights_and_not_on_shards(tmp_path: Path) -> None:
    model = save_model(tmp_path / "one", "llama")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    found = directory_hash(tmp_path / "one")
    assert found == directory_hash(tmp_path / "many")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, -1] += 1
    model.save_pretrained(tmp_path / "changed")
    assert found != directory_hash(tmp_path / "changed")
    model.half().save_pretrained(tmp_path / "half")
    assert len({found, directory_hash(tmp_path / "changed"), directory_hash(tmp_path / "half")}) == 3
