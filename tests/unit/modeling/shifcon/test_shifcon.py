"""The shift changes exactly the tokens that it should, with and without a KV cache, and no bit of the others."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from modeling.errors import ModelError
from modeling.layers import state_hook
from modeling.shifcon.contrastive import ContentPooling
from modeling.shifcon.language_vectors import LanguageVectors
from modeling.shifcon.shift import LanguageShift, shift_tables

MODELS = ["llama", "qwen3", "gpt_neox"]
CACHED = [*MODELS, "mistral", "bloom", "gpt2", "opt"]
EN, DE, SW, XX = range(4)  # XX has no vector
AREA = (1, 3)


def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if name in ("llama", "qwen3", "mistral"):
        sizes |= {"num_key_value_heads": 1, "head_dim": 8}
    sizes |= {"word_embed_proj_dim": 16, "ffn_dim": 32} if name == "opt" else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).eval()


def some_vectors(area: tuple[int, int] = AREA, scale: float = 1.0) -> LanguageVectors:
    generator = torch.Generator().manual_seed(7)
    return LanguageVectors(
        languages=("en", "de", "sw", "xx"),
        dominant="en",
        layers=tuple(range(5)),
        area=area,
        mean=torch.randn(4, 5, 16, generator=generator) * scale,
        state_norm=torch.full((4, 5), 2.0),
        tokens=torch.tensor([9, 9, 9, 0]),
        estimator="random",
        model_hash="",
    )


def shifted(name: str, area: tuple[int, int] = AREA) -> tuple[PreTrainedModel, LanguageShift]:
    model = tiny(name)
    shift = LanguageShift(model, *area)
    shift.set_vectors(some_vectors(area))
    return model, shift


def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """One pass without cache; left-padded rows get the positions that generation gives them."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    extra = {} if model.config.model_type == "bloom" else {"position_ids": positions}
    return model(ids, attention_mask=mask, use_cache=False, **extra).logits.detach()


IDS = torch.arange(1, 21).view(2, 10)


@pytest.mark.parametrize("area", [(1, 3), (0, 2), (0, 4), (3, 4)])
@pytest.mark.parametrize("name", MODELS)
def test_states_are_shifted_by_the_formula_at_the_two_layers_only(name: str, area: tuple[int, int]) -> None:
    model, shift = shifted(name, area)
    mean = shift.vectors.mean
    # Hooks on a second model that add the formula's difference token by token.
    languages = torch.tensor([[DE] * 4 + [SW] * 6, [-1, -1, EN, EN, XX, XX, SW, SW, DE, EN]])

    def by_hand(layer: int, sign: float) -> None:
        def add(hidden: Tensor) -> Tensor:
            hidden = hidden.clone()
            for b in range(2):
                for t in range(10):
                    if (language := languages[b, t].item()) in (DE, SW):
                        hidden[b, t] += sign * (mean[EN, layer] - mean[language, layer])
            return hidden

        state_hook(twin, layer, add)

    with shift.batch(languages):
        ours = logits(model, IDS)
    twin = tiny(name)
    by_hand(area[0], 1.0)
    by_hand(area[1], -1.0)
    torch.testing.assert_close(ours, logits(twin, IDS), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, logits(tiny(name), IDS), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_dominant_unmeasured_and_unmarked_tokens_keep_every_bit(name: str, dtype: torch.dtype) -> None:
    model, shift = shifted(name)
    model.to(dtype)
    plain = logits(model, IDS)
    for still in (EN, XX, -1):
        with shift.batch(torch.full((2, 10), still)):
            assert torch.equal(logits(model, IDS), plain)
    with shift.batch(torch.tensor([[EN] * 10, [DE] * 10])):
        mixed = logits(model, IDS)
    assert torch.equal(mixed[0], plain[0])
    assert not torch.equal(mixed[1], plain[1])


def test_unshifted_rows_keep_the_sign_of_zero() -> None:
    tables = shift_tables(some_vectors())
    state = torch.tensor([0.0, -0.0, 1e-45, torch.inf]).repeat(4)
    for row in (EN, XX, -1):
        for end in (0, 1):
            assert torch.equal((state + tables[end, row]).view(torch.int32), state.view(torch.int32))


def test_the_shift_is_rounded_once_from_fp32() -> None:
    model, shift = shifted("llama")
    model.to(torch.bfloat16)
    before: list[Tensor] = []
    after: list[Tensor] = []
    state_hook(model, AREA[0], lambda hidden: after.append(hidden))
    with shift.batch(torch.full((2, 10), DE)):
        logits(model, IDS)
    shift.set_vectors(None)
    state_hook(model, AREA[0], lambda hidden: before.append(hidden))
    logits(model, IDS)
    mean = some_vectors().mean[:, AREA[0]]
    assert torch.equal(after[0], before[0] + (mean[EN] - mean[DE]).to(torch.bfloat16))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, shift = shifted(name)
        pooling = ContentPooling(model, range(*AREA))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        segments = torch.tensor([[0] * 5 + [1] * 5, [2] * 8 + [-1] * 2])
        with (
            shift.batch(torch.tensor([[DE] * 10, [EN] * 5 + [SW] * 5])),
            pooling.batch(segments, IDS % 3 > 0, 3) as pooled,
        ):
            out = model(IDS, use_cache=False).logits
        (out.square().mean() + sum(state.square().sum() for state in pooled)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for key, gradient in gradients[0].items():
        assert gradient.abs().max() > 0 or "key_value" in key or "bias" in key, key
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-5, atol=1e-6, msg=key)


# Generation: a left-padded batch of one German and one Swahili prompt, each answered in the other's language.
PROMPTS = torch.tensor([[0, 0, 5, 6, 7], [9, 10, 11, 12, 13]])
MASK = (PROMPTS > 0).long()
PROMPT_LANGUAGES = torch.tensor([[-1, -1, DE, DE, DE], [SW] * 5])
RESPONSES = torch.tensor([SW, DE])
NEW = 6


@pytest.mark.parametrize("name", CACHED)
def test_greedy_decoding_with_a_cache_equals_the_full_forward_pass(name: str) -> None:
    model, shift = shifted(name)
    with shift.batch(PROMPT_LANGUAGES, RESPONSES):
        cached = model.generate(
            PROMPTS,
            attention_mask=MASK,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens, mask, languages = PROMPTS, MASK, PROMPT_LANGUAGES
    for step in range(NEW):
        with shift.batch(languages):
            full = logits(model, tokens, mask)[:, -1]
        torch.testing.assert_close(cached.logits[step], full, rtol=1e-4, atol=1e-4)
        tokens = torch.cat([tokens, full.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        languages = torch.cat([languages, RESPONSES[:, None]], 1)
    assert torch.equal(cached.sequences, tokens)
    assert not torch.equal(
        cached.sequences, model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=NEW, do_sample=False)
    )


@pytest.mark.parametrize("name", MODELS)
def test_beam_search_with_a_cache_equals_the_full_forward_pass(name: str) -> None:
    model, shift = shifted(name)
    beams = {
        "attention_mask": MASK,
        "max_new_tokens": NEW,
        "do_sample": False,
        "num_beams": 3,
        "num_return_sequences": 2,
        "length_penalty": 0.0,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    with shift.batch(PROMPT_LANGUAGES, RESPONSES):
        cached = model.generate(PROMPTS, use_cache=True, **beams)
        uncached = model.generate(PROMPTS, use_cache=False, **beams)
    assert torch.equal(cached.sequences, uncached.sequences)
    # The scores are those of a plain pass over the finished sequences, languages written out by hand.
    rows = torch.tensor([0, 0, 1, 1])
    with shift.batch(torch.cat([PROMPT_LANGUAGES[rows], RESPONSES[rows, None].expand(-1, NEW)], 1)):
        mask = torch.cat([MASK[rows], torch.ones(4, NEW, dtype=torch.long)], 1)
        chances = logits(model, cached.sequences, mask)[:, 4:-1].log_softmax(-1)
    scores = chances.gather(2, cached.sequences[:, 5:, None]).sum((1, 2))
    torch.testing.assert_close(cached.sequences_scores, scores, rtol=1e-4, atol=1e-4)


def test_generated_tokens_take_the_response_language_or_the_prompts() -> None:
    model, shift = shifted("llama")
    options = {"attention_mask": MASK, "max_new_tokens": NEW, "do_sample": False}
    with shift.batch(PROMPT_LANGUAGES):
        inferred = model.generate(PROMPTS, **options)
    with shift.batch(PROMPT_LANGUAGES, torch.tensor([DE, SW])):
        given = model.generate(PROMPTS, **options)
    assert torch.equal(inferred, given)
    # Trailing tokens without a language (a template's end) do not change the prompt's language.
    index = torch.tensor([[DE, SW, -1], [-1, -1, -1]])
    with shift.batch(index):
        assert shift._token_languages(index, 3, 2, 1, False).tolist() == [[SW], [-1]]


@pytest.mark.parametrize("make_cache", [DynamicCache, StaticCache])
def test_languages_match_the_tokens_of_one_token_prompts_and_of_chunked_prompts(make_cache: type) -> None:
    model, shift = shifted("llama")
    ids, languages = IDS[:1, :6], torch.tensor([[DE, SW, EN, DE]])
    with shift.batch(languages, torch.tensor([SW])):
        whole = logits(model, ids)
        options = {"max_cache_len": 16} if make_cache is StaticCache else {}
        cache = make_cache(config=model.config, **options)
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([1, 2, 2, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*MODELS, "bloom"])
def test_left_padding_changes_nothing(name: str) -> None:
    model, shift = shifted(name)
    with shift.batch(PROMPT_LANGUAGES):
        together = logits(model, PROMPTS, MASK)
    with shift.batch(torch.full((1, 3), DE)):
        alone = logits(model, PROMPTS[:1, 2:])
    torch.testing.assert_close(together[:1, 2:], alone, rtol=1e-4, atol=1e-4)


def test_packed_rows_shift_each_token_by_its_own_language() -> None:
    model, shift = shifted("llama")
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    with shift.batch(torch.tensor([[DE] * 4 + [SW] * 4 + [EN] * 2])):
        packed = model(IDS[:1], position_ids=positions, use_cache=False).logits
    with shift.batch(torch.full((1, 4), DE)):
        first = logits(model, IDS[:1, :4])
    with shift.batch(torch.tensor([[SW] * 4 + [EN] * 2])):
        second = logits(model, IDS[:1, 4:])
    torch.testing.assert_close(packed, torch.cat([first, second], 1), rtol=1e-4, atol=1e-4)


def test_the_shift_works_with_lora() -> None:
    model, shift = shifted("llama")
    languages = torch.full((2, 10), DE)
    with shift.batch(languages):
        plain = logits(model, IDS)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        assert torch.equal(adapted(IDS, use_cache=False).logits, plain)
    late = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    shift = LanguageShift(late, *AREA)
    shift.set_vectors(some_vectors())
    with shift.batch(languages):
        torch.testing.assert_close(late(IDS, use_cache=False).logits, plain)


def test_the_shift_is_off_outside_a_batch_disabled_without_vectors_or_removed() -> None:
    model, shift = shifted("llama")
    languages = torch.full((2, 10), DE)
    plain = logits(tiny("llama"), IDS)
    assert torch.equal(logits(model, IDS), plain)
    with shift.batch(languages):
        moved = logits(model, IDS)
        with shift.disabled():
            assert torch.equal(logits(model, IDS), plain)
        assert torch.equal(logits(model, IDS), moved)
        shift.set_vectors(None)
        assert torch.equal(logits(model, IDS), plain)
        shift.set_vectors(some_vectors(scale=2.0))  # no table of the old vectors is used
        assert not torch.allclose(logits(model, IDS), moved)
        shift.set_vectors(some_vectors())
        assert torch.equal(logits(model, IDS), moved)
        with pytest.raises(RuntimeError, match="boom"), shift.batch(torch.full((2, 10), SW)):
            raise RuntimeError("boom")
        assert torch.equal(logits(model, IDS), moved)
        shift.remove()
        assert torch.equal(logits(model, IDS), plain)


def test_vectors_and_batches_that_do_not_fit_are_refused() -> None:
    model, shift = shifted("llama")
    for area in [(2, 2), (3, 1), (-1, 2), (2, 5)]:
        with pytest.raises(ModelError, match="need 0 <= toward < back <= 4"):
            LanguageShift(model, *area)
    with pytest.raises(ModelError, match=r"area \(0, 2\) and width 16 do not fit area \(1, 3\)"):
        shift.set_vectors(some_vectors((0, 2)))
    with shift.batch(torch.full((2, 10), DE)):
        with pytest.raises(ModelError, match="3 rows and 10 tokens without a cache"):
            logits(model, IDS[:1].expand(3, -1))
        with pytest.raises(ModelError, match="2 rows and 4 tokens without a cache"):
            logits(model, IDS[:, :4])


def test_shift_norms_are_relative_to_the_states() -> None:
    _, shift = shifted("llama")
    mean = some_vectors().mean[:, AREA[0]]
    norms = shift.shift_norms()
    assert list(norms) == ["en", "de", "sw"]
    assert norms["en"] == 0.0
    assert norms["sw"] == pytest.approx(((mean[EN] - mean[SW]).norm() / 2).item())
    shift.set_vectors(None)
    assert shift.shift_norms() == {}
