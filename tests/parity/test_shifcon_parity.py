"""ShifCon against a slow second implementation, written only from the formulas.

It runs the model layer by layer, one sample at a time, adds the shift token by token, and takes both losses
with loops. The implementation under test is one packed (or padded) forward pass with hooks. Losses and the gradients
of every parameter must agree.
"""

import math

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from modeling.shifcon.contrastive import ContentPooling, contrastive_losses, pair_cosines
from modeling.shifcon.language_vectors import LanguageVectors
from modeling.shifcon.shift import LanguageShift

TOWARD, BACK, SCALE = 1, 3, 6.0
A, B = 0.5, 2.0  # the authors' weights of the two losses
LANGUAGES = ("en", "de", "sw")

# (prompt language, answer language, item, tokens, content positions, first label position)
SAMPLES = [
    ("en", "en", 1, [5, 9, 12, 33, 7, 40], [1, 2], 4),
    ("de", "de", 1, [5, 21, 22, 23, 8, 41, 42], [1, 2, 3], 4),
    ("sw", "en", 2, [5, 50, 51, 11, 13], [1, 2], 3),  # a Swahili question answered in English
    ("en", "en", 2, [5, 30, 31, 32, 14, 15], [2, 3], 4),
    ("de", "de", 3, [5, 44, 45, 46, 16], [1, 3], 4),
    ("en", "en", 3, [5, 17, 18, 19, 20, 43], [1, 2, 3], 5),
    ("sw", "sw", 4, [5, 60, 61, 62], [1, 2], 3),  # in no pair
]
PAIRS = [(0, 1), (3, 2), (5, 4)]  # (dominant, other)


def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    sizes |= {} if name == "gpt_neox" else {"num_key_value_heads": 1, "head_dim": 8}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes))


def make_vectors() -> LanguageVectors:
    mean = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(4))
    norm, tokens = torch.ones(3, 2), torch.ones(3, dtype=torch.int64)
    return LanguageVectors(LANGUAGES, "en", (TOWARD, BACK), (TOWARD, BACK), mean, norm, tokens, "", "")


def token_language(sample: tuple, position: int) -> str:
    return sample[1] if position >= sample[5] else sample[0]


def slow_sample(model: PreTrainedModel, vectors: LanguageVectors, sample: tuple) -> tuple[Tensor, list[Tensor], Tensor]:
    """One sample through the model by hand: (summed label loss, mean content state per area layer, logits)."""
    vector = {
        (language, layer): vectors.mean[i, k]
        for i, language in enumerate(LANGUAGES)
        for k, layer in enumerate((TOWARD, BACK))
    }
    tokens, content, first_label = sample[3], sample[4], sample[5]
    inner = model.gpt_neox if hasattr(model, "gpt_neox") else model.model
    embed = inner.embed_in if hasattr(inner, "embed_in") else inner.embed_tokens
    norm = inner.final_layer_norm if hasattr(inner, "final_layer_norm") else inner.norm
    hidden = embed(torch.tensor([tokens]))
    rotary = inner.rotary_emb(hidden, torch.arange(len(tokens))[None])
    pooled = []
    for layer in range(4):
        rows = list(hidden[0])
        for t in range(len(tokens)):
            language = token_language(sample, t)
            if language != "en" and layer == TOWARD:
                rows[t] = rows[t] + vector["en", TOWARD] - vector[language, TOWARD]
            if language != "en" and layer == BACK:
                rows[t] = rows[t] + vector[language, BACK] - vector["en", BACK]
        if TOWARD <= layer < BACK:
            pooled.append(sum(rows[t] for t in content) / len(content))
        output = inner.layers[layer](torch.stack(rows)[None], attention_mask=None, position_embeddings=rotary)
        hidden = output[0] if isinstance(output, tuple) else output
    logits = model.lm_head(norm(hidden))[0]
    loss = torch.zeros(())
    for t in range(first_label, len(tokens)):
        probabilities = torch.softmax(logits[t - 1], dim=0)
        loss = loss - torch.log(probabilities[tokens[t]])
    return loss, pooled, logits


def slow_loss(model: PreTrainedModel, vectors: LanguageVectors) -> tuple[Tensor, list[Tensor]]:
    """a * SFT / label tokens + b * contrastive / pairs, all by loops; and each sample's logits."""
    outcomes = [slow_sample(model, vectors, sample) for sample in SAMPLES]
    n_labels = sum(len(sample[3]) - sample[5] for sample in SAMPLES)
    sft = sum(outcome[0] for outcome in outcomes) / n_labels

    def similarity(i: int, j: int, layer: int) -> Tensor:
        x, y = outcomes[PAIRS[i][0]][1][layer], outcomes[PAIRS[j][1]][1][layer]
        return SCALE * (x @ y) / (x.norm() * y.norm())

    contrast = torch.zeros(())
    for layer in range(BACK - TOWARD):
        for i in range(len(PAIRS)):
            right = torch.exp(similarity(i, i, layer))
            row = sum(torch.exp(similarity(i, j, layer)) for j in range(len(PAIRS)))
            column = sum(torch.exp(similarity(j, i, layer)) for j in range(len(PAIRS)))
            contrast = contrast - (torch.log(right / row) + torch.log(right / column)) / 2
    contrast = contrast / (BACK - TOWARD) / len(PAIRS)
    return A * sft + B * contrast, [outcome[2] for outcome in outcomes]


def lay_out(packed: bool) -> dict[str, Tensor]:
    """All samples as rows: two packed rows with restarting positions, or one padded row a sample."""
    rows = [[0, 1, 2, 3], [4, 5, 6]] if packed else [[i] for i in range(len(SAMPLES))]
    width = max(sum(len(SAMPLES[i][3]) for i in row) for row in rows)
    fill = {"ids": 0, "positions": 0, "languages": -1, "segments": -1, "content": 0, "labels": -100, "real": 0}
    batch = {key: torch.full((len(rows), width), value) for key, value in fill.items()}
    for b, row in enumerate(rows):
        column = 0
        for i in row:
            for t, token in enumerate(SAMPLES[i][3]):
                values = {
                    "ids": token,
                    "positions": t,
                    "languages": LANGUAGES.index(token_language(SAMPLES[i], t)),
                    "segments": i,
                    "content": t in SAMPLES[i][4],
                    "labels": token if t >= SAMPLES[i][5] else -100,
                    "real": 1,
                }
                for key, value in values.items():
                    batch[key][b, column] = value
                column += 1
    return batch


def system_loss(model: PreTrainedModel, vectors: LanguageVectors, packed: bool) -> tuple[Tensor, list[Tensor]]:
    """The same through the hooks: one forward pass over all samples."""
    shift = LanguageShift(model, TOWARD, BACK)
    shift.set_vectors(vectors)
    pooling = ContentPooling(model, range(TOWARD, BACK))
    batch = lay_out(packed)
    mask = {} if packed else {"attention_mask": batch["real"]}
    with (
        shift.batch(batch["languages"]),
        pooling.batch(batch["segments"], batch["content"].bool(), len(SAMPLES)) as pooled,
    ):
        logits = model(batch["ids"], position_ids=batch["positions"], use_cache=False, **mask).logits
    labels = batch["labels"][:, 1:]
    sft = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")
    items = torch.tensor([SAMPLES[dominant][2] for dominant, _ in PAIRS])
    same_item = (items[:, None] == items) & ~torch.eye(len(PAIRS), dtype=torch.bool)
    cosines = pair_cosines(torch.stack(pooled), torch.tensor([PAIRS]))
    contrast = contrastive_losses(cosines, same_item[None], SCALE).sum()
    per_sample = [logits[batch["segments"] == i] for i in range(len(SAMPLES))]
    return A * sft / (labels >= 0).sum() + B * contrast / len(PAIRS), per_sample


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_one_hooked_forward_pass_equals_the_method(name: str, packed: bool, checkpointing: bool) -> None:
    vectors = make_vectors()
    slow_model, model = tiny(name), tiny(name)
    expected, expected_logits = slow_loss(slow_model, vectors)
    expected.backward()
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss, logits = system_loss(model, vectors, packed)
    loss.backward()
    assert math.isfinite(loss.item())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(logits, expected_logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    slow_parameters = dict(slow_model.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, slow_parameters[key].grad, rtol=1e-3, atol=1e-5, msg=key)


def test_the_shift_changes_the_compared_states() -> None:
    """The parity test would show nothing if the shift or its inverse had no effect here."""
    no_shift, no_shift_back = make_vectors(), make_vectors()
    no_shift.mean.copy_(no_shift.mean[:1].expand(3, -1, -1))
    no_shift_back.mean[:, 1] = no_shift_back.mean[:1, 1]
    with torch.no_grad():
        german = [
            system_loss(tiny("llama"), vectors, packed=True)[1][1]
            for vectors in (make_vectors(), no_shift, no_shift_back)
        ]
    assert (german[1] - german[0]).abs().max() > 0.1
    assert (german[2] - german[0]).abs().max() > 0.1
