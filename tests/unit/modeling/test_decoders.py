"""Every decoder that docs/methods.md names trains, shifts, generates, is exported and opened again, as a tiny model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import LANGUAGES, PreparedRun
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from data_pipeline.batching.packer import Packer
from data_pipeline.loader import ThisRank
from modeling.errors import ModelError
from modeling.generation import Prompt, ShiftedGenerator
from modeling.layers import decoder_layers, state_hook
from modeling.layout import choose_layout
from modeling.loading import resolve_attention
from modeling.module_calls import check_module_calls
from modeling.shifcon.bake import bake
from modeling.shifcon.language_vectors import LanguageVectors
from modeling.shifcon.shift import LanguageShift
from training.assembly import DataParts, assemble_data
from training.checkpoints import checkpoint
from training.checkpoints.export import export_checkpoint
from training.checkpoints.run_state import RunState
from training.engine import state as engine_state
from training.engine.start_checks import reference_inputs, reference_logits
from training.objectives.base import ObjectiveParts
from training.objectives.shifcon import ShifConConfig
from training.run_file import resolved

N_LAYERS, WIDTH, AREA = 4, 32, (1, 3)
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}


@dataclass(frozen=True)
class Decoder:
    """What is known of an architecture: the table of docs/methods.md, section 1.8."""

    config: dict[str, Any] = field(default_factory=dict)
    layers: str = "model.layers"
    layout: str = "packed"
    baked: bool = False
    several_ranks: bool = True
    unused_experts: int = 0  # the last ones of the experts' weight


DECODERS = {
    "llama": Decoder(GROUPED, baked=True),
    "qwen2": Decoder({"num_key_value_heads": 2}, baked=True),
    "qwen3": Decoder(GROUPED),
    "mistral": Decoder({**GROUPED, "sliding_window": 6}),
    "mixtral": Decoder({**GROUPED, **EXPERTS}),
    "qwen3_moe": Decoder({**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "gemma2": Decoder({**GROUPED, **ALTERNATING}),
    "gemma3_text": Decoder({**GROUPED, **ALTERNATING}),
    "phi": Decoder({"num_key_value_heads": 2}, baked=True),
    "phi3": Decoder({"num_key_value_heads": 2}),
    "olmo2": Decoder({"num_key_value_heads": 2}),
    "bloom": Decoder({}, "transformer.h", "padded", baked=True),
    "gpt_neox": Decoder({}, "gpt_neox.layers", baked=True),
    "falcon": Decoder({}, "transformer.h"),
    "cohere": Decoder({"num_key_value_heads": 2}),
    "cohere2": Decoder({**GROUPED, **ALTERNATING}),
    "gpt_oss": Decoder({**GROUPED, **ALTERNATING, **EXPERTS}, layout="padded"),
    "longcat_flash": Decoder(
        {
            "num_hidden_layers": 8,
            "crosslift_layers": "layers",
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "moe_topk": 2,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "head_dim": 8,
            "v_head_dim": 8,
            "expert_ffn_hidden_size": 16,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
        },
        several_ranks=False,
        unused_experts=2,
    ),
}
every_decoder = pytest.mark.parametrize("name", DECODERS)


def tiny(name: str, vocabulary: int = 64) -> PreTrainedModel:
    """A random model in eval mode with the attention that a run would choose; no two of its layers are alike."""
    torch.manual_seed(2)
    sizes = {
        "vocab_size": vocabulary, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.25,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(name, **{**sizes, **DECODERS[name].config})
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=resolve_attention("auto", config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms are ones, biases zeros, sinks uninitialised
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()  # type: ignore[no-any-return]


@contextmanager
def added(model: PreTrainedModel, name: str, deltas: dict[int, Tensor]) -> Iterator[None]:
    """Inside, `deltas[l]` is added to the state that enters layer `l`, or to the last layer's output."""
    layers = model.get_submodule(DECODERS[name].layers)

    def entering(delta: Tensor) -> Any:
        return lambda _, args: (args[0] + delta, *args[1:])

    def leaving(delta: Tensor) -> Any:
        return lambda _, __, out: (out[0] + delta, *out[1:]) if isinstance(out, tuple) else out + delta

    handles = [
        layers[at].register_forward_pre_hook(entering(delta))
        if at < N_LAYERS
        else layers[-1].register_forward_hook(leaving(delta))
        for at, delta in deltas.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def alone(
    model: PreTrainedModel, name: str, ids: Sequence[int], of_token: Sequence[str | None], vectors: LanguageVectors
) -> Tensor:
    """(T, V) logits of one text without cache, mask or padding; each token shifted by the formula."""
    deltas = {}
    for at, sign in zip(vectors.area, (1.0, -1.0), strict=True):
        mean, rows = vectors.mean[:, vectors.layers.index(at)], torch.zeros(len(ids), WIDTH)
        for t, language in enumerate(of_token):
            if language is not None:
                rows[t] = sign * (mean[0] - mean[vectors.languages.index(language)])
        deltas[at] = rows
    with added(model, name, deltas):
        return model(torch.tensor([ids]), use_cache=False).logits[0]


@every_decoder
def test_the_layers_are_found_and_hooks_see_and_replace_the_state(name: str) -> None:
    model, ids = tiny(name), torch.arange(3, 17).view(2, 7)
    assert decoder_layers(model) is model.get_submodule(DECODERS[name].layers)
    seen: dict[int, Tensor] = {}
    handles = [state_hook(model, at, lambda hidden, at=at: seen.update({at: hidden})) for at in range(N_LAYERS + 1)]
    expected = model(ids, output_hidden_states=True, use_cache=False)
    for at in range(N_LAYERS):
        assert torch.equal(seen[at], expected.hidden_states[at])
    assert len({float(state.detach().sum()) for state in seen.values()}) == N_LAYERS + 1
    for handle in handles:
        handle.remove()
    for at in range(N_LAYERS + 1):
        handle = state_hook(model, at, lambda hidden: hidden * 0 + torch.arange(WIDTH) / WIDTH)
        replaced = model(ids, use_cache=False).logits
        handle.remove()
        assert not torch.allclose(replaced, expected.logits, atol=1e-2)
    # after the last layer only the norm and the head follow
    assert torch.allclose(replaced, replaced[:1, :1].expand_as(replaced), atol=1e-5)
    assert torch.equal(model(ids, use_cache=False).logits, expected.logits)


TEXTS = ([5, 9, 12, 33, 7, 40, 21], [50, 51, 11], [30, 31, 32, 14, 15, 44, 45, 46, 16, 60])
TOKEN_LANGUAGES = (["de"] * 4 + ["sw"] * 3, ["sw"] * 3, [None] + ["en"] * 3 + ["de"] * 6)


def some_vectors(area: tuple[int, int]) -> LanguageVectors:
    mean = torch.randn(4, 2, WIDTH, generator=torch.Generator().manual_seed(4))
    return LanguageVectors(
        LANGUAGES, "en", area, area, mean, torch.ones(4, 2), torch.ones(4, dtype=torch.int64), "", ""
    )


def rows_of_texts(layout: str) -> tuple[dict[str, Any], Tensor, list[tuple[int, int]]]:
    """The model's arguments, the languages (B, T), and the row and column of each text, as in a micro-batch."""
    rows = [[0, 1, 2]] if layout == "packed" else [[0], [1], [2]]
    width = max(sum(len(TEXTS[i]) for i in row) for row in rows)
    ids, positions = torch.full((len(rows), width), 2), torch.arange(width).repeat(len(rows), 1)
    languages, places = torch.full((len(rows), width), -1), []
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            stop = start + len(TEXTS[i])
            ids[r, start:stop], positions[r, start:stop] = torch.tensor(TEXTS[i]), torch.arange(stop - start)
            languages[r, start:stop] = torch.tensor(
                [-1 if each is None else LANGUAGES.index(each) for each in TOKEN_LANGUAGES[i]]
            )
            places.append((r, start))
            start = stop
        positions[r, start:] = torch.arange(width - start)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False, "attention_mask": None}
    if layout == "padded":
        inputs["attention_mask"] = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in TEXTS])
    return inputs, languages, places


@pytest.mark.parametrize("area", [AREA, (0, N_LAYERS)])
@every_decoder
def test_shifted_logits_and_gradients_are_those_of_each_text_alone(name: str, area: tuple[int, int]) -> None:
    vectors, slow, model = some_vectors(area), tiny(name), tiny(name)
    attention = model.config._attn_implementation
    assert choose_layout(model.config, attention).layout == DECODERS[name].layout
    expected = [alone(slow, name, *each, vectors) for each in zip(TEXTS, TOKEN_LANGUAGES, strict=True)]
    sum(logits.square().mean() for logits in expected).backward()
    gradients = {key: parameter.grad for key, parameter in slow.named_parameters()}
    largest = max(float(each.abs().max()) for each in gradients.values())
    shift = LanguageShift(model, *area)
    shift.set_vectors(vectors)
    chosen = DECODERS[name].layout
    for layout, checkpointing in {("padded", False): 0, (chosen, False): 0, (chosen, True): 0}:
        inputs, languages, places = rows_of_texts(layout)
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        with shift.batch(languages):
            logits = model(**inputs).logits
        found = [logits[r, c : c + len(text)] for (r, c), text in zip(places, TEXTS, strict=True)]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        model.zero_grad()
        sum(each.square().mean() for each in found).backward()
        for key, parameter in model.named_parameters():
            difference = float((parameter.grad - gradients[key]).abs().max())
            assert difference < 1e-4 * largest, (key, layout, checkpointing)
    model.eval().gradient_checkpointing_disable()
    plain = model(torch.tensor(TEXTS[:1]), use_cache=False).logits[0]
    assert not torch.allclose(plain, expected[0], atol=0.1), "the shift has an effect"


@every_decoder
def test_each_pass_calls_the_same_modules(name: str, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny(name).config
    with caplog.at_level("INFO"):
        check_module_calls(config, "causal-lm", ranks=1)
        if DECODERS[name].several_ranks:
            check_module_calls(config, "causal-lm", ranks=2)
        else:
            with pytest.raises(ModelError, match=r"the modules that run depend on the tokens .* 2 ranks would wait"):
                check_module_calls(config, "causal-lm", ranks=2)
    assert "not checked" not in caplog.text


@pytest.fixture(scope="module")
def data(prepared_run: PreparedRun) -> DataParts:
    return assemble_data(prepared_run.config, prepared_run.prepared)


@pytest.fixture(scope="module", params=DECODERS)
def trained(request: pytest.FixtureRequest, data: DataParts) -> SimpleNamespace:
    """A model after one optimizer step of ShifCon on the first step's micro-batches, and its weights before it."""
    name = request.param
    model = tiny(name, len(data.tokenizer))
    grid = replace(data.packer.grid, layout=DECODERS[name].layout)
    parts = replace(data, packer=Packer(grid, data.packer.collator))
    section = ShifConConfig(
        name="shifcon", layers=AREA, probe_items=16, contrastive={"weight": 0.5, "scale": 10.0, "set_size": 2}
    )
    probe = parts.probe_batches(ThisRank())
    objective: Any = section.build(model, ObjectiveParts("chat", tuple(data.index.languages), "en", probe=probe))
    engine = SimpleNamespace(
        module=model, device=torch.device("cpu"), forward=model.__call__, evaluating=lambda: torch.no_grad()
    )
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    metrics = objective.before_step(engine, 0)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0), {}
    model.train()
    (step,) = parts.loader().steps(0, 1)
    for batch in step.micro_batches:
        terms = objective.loss_terms(engine, batch).terms
        sum(term.weight * term.sum for term in terms.values()).backward()
        for key, term in terms.items():
            losses[key] = losses.get(key, 0.0) + float(term.sum.detach())
    optimizer.step()
    model.eval()
    return SimpleNamespace(
        name=name, model=model, section=section, objective=objective, engine=engine, before=before, metrics=metrics,
        losses=losses, chunked=objective.head.change is not None,
    )  # fmt: skip


def test_a_step_of_shifcon_changes_every_weight_and_expert(trained: SimpleNamespace) -> None:
    assert trained.losses["sft"] > 0
    assert trained.losses["contrastive"] > 0
    assert all(torch.isfinite(torch.tensor(value)) for value in (trained.losses | trained.metrics).values())
    assert trained.chunked, "the logits of a chunk of labels are all that exist"
    for key, parameter in trained.model.named_parameters():
        changed = parameter.detach() != trained.before[key]
        # of an experts' weight (E, ., .) each expert, of another weight each output, but for tokens not in the batch
        parts = changed.flatten(1) if changed.dim() > 1 else changed[None]
        if "experts.gate_up_proj" in key:
            parts = parts[: len(parts) - DECODERS[trained.name].unused_experts]
        assert parts.any(dim=1).all() or ("embed" in key and changed.any()), key


@pytest.fixture(scope="module")
def exported(trained: SimpleNamespace, data: DataParts, prepared_run: PreparedRun, tmp_path_factory: Any) -> Path:
    """The export of the trained model, made of a checkpoint as a run writes it."""
    run = tmp_path_factory.mktemp(trained.name) / "run"
    folder = checkpoint.begin(run, 1)
    trained.model.config.save_pretrained(folder / "model_config")
    data.tokenizer.save_pretrained(folder / "model_config")
    trained.objective.save(trained.engine, folder)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        logits = reference_logits(trained.model(**reference_inputs(ids)))
    attention = trained.model.config._attn_implementation
    save_file({"input_ids": ids, "logits": logits}, folder / checkpoint.REFERENCE_FILE, {"attention": attention})
    config = prepared_run.config.model_copy(update={"objective": trained.section})
    RunState(step=1, world_size=1, fingerprint={}, config=resolved(config), versions={}).write(folder)
    tied = trained.model.all_tied_weights_keys
    weights = {key: tensor for key, tensor in trained.model.state_dict().items() if key not in tied}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_state, "consolidated", lambda *_: iter(weights.items()))
        return export_checkpoint(checkpoint.commit(run, 1, {}), run / "model")


def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    languages = (("de", None), ("sw", "en"), ("en", None), (None, None), ("zh", "de"))
    return [
        Prompt(torch.randint(10, 90, (length,), generator=generator).tolist(), *language)
        for length, language in zip((7, 3, 12, 1, 9), languages, strict=True)
    ]


def test_the_export_is_reopened_with_the_same_shifted_logits(trained: SimpleNamespace, exported: Path) -> None:
    generator = ShiftedGenerator.from_directory(exported)
    assert generator.shift is not None
    assert generator.vectors is not None
    ids = torch.tensor([prompt.ids * 3 for prompt in prompts()[:1]])
    languages = torch.full_like(ids, LANGUAGES.index("sw"))
    with torch.no_grad():
        with generator.shift.batch(languages):
            found = generator.model(ids, use_cache=False).logits
        with trained.objective.shift.batch(languages):
            expected = trained.model(ids, use_cache=False).logits
        plain = trained.model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_cached_generation_of_a_mixed_batch_is_that_of_each_prompt_without_cache(exported: Path) -> None:
    generator = ShiftedGenerator.from_directory(exported)
    assert generator.vectors is not None
    assert generator.shift is not None
    answers = generator.generate(prompts(), max_new_tokens=6)
    generator.shift.remove()
    for prompt, answer in zip(prompts(), answers, strict=True):
        ids, response = list(prompt.ids), prompt.response_language or prompt.language
        for _ in range(6):
            of_token = [prompt.language] * len(prompt.ids) + [response] * (len(ids) - len(prompt.ids))
            with torch.no_grad():
                token = int(
                    alone(generator.model, generator.model.config.model_type, ids, of_token, generator.vectors)[
                        -1
                    ].argmax()
                )
            if token in generator.end_ids:
                break
            ids.append(token)
        assert answer.token_ids == ids[len(prompt.ids) :]
    assert len({tuple(answer.token_ids) for answer in answers}) > 2


def test_a_language_is_baked_or_refused(trained: SimpleNamespace, exported: Path, tmp_path: Path) -> None:
    if DECODERS[trained.name].baked:
        assert bake(exported, "sw", tmp_path) < 1e-4
        return
    with pytest.raises(ModelError, match="serve the model with its vectors"):
        bake(exported, "sw", tmp_path)
