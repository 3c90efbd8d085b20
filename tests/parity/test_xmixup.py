"""X-Mixup against a slow second implementation, written only from the formulas.

It uses the weights by name and nothing else of transformers: embeddings, every layer, heads, mixing and losses are
loops over samples, positions and heads in fp64. The implementation under test is one stacked forward pass with hooks.
"""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from modeling.tasks.encoder_states import EncoderStates
from modeling.tasks.task_losses import classification_losses, span_losses, tagging_losses
from modeling.xmixup.consistency import consistency, content_mask, representations
from modeling.xmixup.mixup import CrossLingualMixup

HIDDEN, HEADS, LAYERS, CLASSES, EPS = 8, 2, 3, 3, 1e-5
START, PAD, END = 0, 1, 2
MIXED_LAYER, LAM0, ALPHA = 1, 0.5, 0.3
MODELS = ("bert", "roberta", "xlm-roberta")
AUTO = {
    "classification": AutoModelForSequenceClassification,
    "tagging": AutoModelForTokenClassification,
    "qa": AutoModelForQuestionAnswering,
}
# Token ids of target and source, without start and end; different lengths, so that both sides are padded.
PAIRS = [([5, 9, 12], [21, 22, 23, 24, 25]), ([30, 31, 32, 33, 34, 6], [7, 8]), ([40], [41, 42, 43])]
# Label probabilities of the target (for example a translate-train teacher's) and the class of the source.
SOFT, HARD = [[0.7, 0.2, 0.1], [0.0, 0.25, 0.75], [0.1, 0.8, 0.1]], [0, 2, 1]
# The answer's first and last token, start token counted, of target and source.
SPANS = [((1, 2), (2, 4)), ((3, 6), (0, 0)), ((1, 1), (3, 3))]


def tiny(name: str, kind: str, attention: str = "sdpa", dropout: float = 0.0) -> PreTrainedModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        name, vocab_size=50, hidden_size=HIDDEN, intermediate_size=12, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=24, type_vocab_size=2, pad_token_id=PAD,
        initializer_range=0.5, layer_norm_eps=EPS, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, num_labels=2 if kind == "qa" else CLASSES,
    )  # fmt: skip
    model = AUTO[kind].from_config(config, attn_implementation=attention, dtype=torch.float64)
    with torch.no_grad():  # biases and norms are not 0 and 1 in trained models
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def rows_of(width: int = 0) -> list[list[int]]:
    """Targets, then sources, with start and end, padded to the longest or to `width`."""
    rows = [[START, *pair[side], END] for side in (0, 1) for pair in PAIRS]
    width = max(width, *(len(row) for row in rows))
    return [row + [PAD] * (width - len(row)) for row in rows]


# --- the slow implementation -----------------------------------------------------------------------------------------


class Slow:
    """A model as its weights by name; vectors are (H,), a text is a list of them, one a position."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.roberta = model.config.model_type != "bert"
        self.weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
        self.inner = "roberta." if self.roberta else "bert."
        self.ratios: list[Tensor] = []

    def linear(self, name: str, vector: Tensor) -> Tensor:
        return self.weights[name + ".weight"] @ vector + self.weights[name + ".bias"]

    def norm(self, name: str, vector: Tensor) -> Tensor:
        centred = vector - vector.mean()
        scaled = centred / torch.sqrt((centred * centred).mean() + EPS)
        return scaled * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def embedded(self, row: list[int]) -> list[Tensor]:
        table = self.inner + "embeddings."
        states = []
        seen = 0
        for position, token in enumerate(row):
            seen += token != PAD
            place = position if not self.roberta else (PAD + seen if token != PAD else PAD)
            word = self.weights[table + "word_embeddings.weight"][token]
            position_embedding = self.weights[table + "position_embeddings.weight"][place]
            if token == PAD:  # transformers trains no embedding of padding
                word, position_embedding = (
                    word.detach(),
                    position_embedding.detach() if self.roberta else position_embedding,
                )
            vector = word + position_embedding + self.weights[table + "token_type_embeddings.weight"][0]
            states.append(self.norm(table + "LayerNorm", vector))
        return states

    def scores(self, layer: str, queries: list[Tensor], keys: list[Tensor]) -> list[list[list[Tensor]]]:
        """[head][query][key], divided by the root of the head size."""
        size = HIDDEN // HEADS
        q = [self.linear(layer + "attention.self.query", state) for state in queries]
        k = [self.linear(layer + "attention.self.key", state) for state in keys]
        cuts = [slice(head * size, (head + 1) * size) for head in range(HEADS)]
        return [[[(a[cut] * b[cut]).sum() / math.sqrt(size) for b in k] for a in q] for cut in cuts]

    def attended(self, layer: str, queries: list[Tensor], keys: list[Tensor], row: list[int]) -> list[Tensor]:
        """The attention block's dense output at each query; keys are the tokens of `row` that are not padding."""
        size = HIDDEN // HEADS
        scores = self.scores(layer, queries, keys)
        values = [self.linear(layer + "attention.self.value", state) for state in keys]
        outputs = []
        for i in range(len(queries)):
            parts = []
            for head in range(HEADS):
                probabilities = softmax({j: scores[head][i][j] for j, token in enumerate(row) if token != PAD})
                parts.append(sum(probabilities[j] * values[j][head * size : (head + 1) * size] for j in probabilities))
            outputs.append(self.linear(layer + "attention.output.dense", torch.cat(parts)))
        return outputs

    def feed_forward(self, layer: str, states: list[Tensor]) -> list[Tensor]:
        outputs = []
        for state in states:
            inner = self.linear(layer + "intermediate.dense", state)
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            outputs.append(self.norm(layer + "output.LayerNorm", self.linear(layer + "output.dense", inner) + state))
        return outputs

    def self_attention(self, layer: str, states: list[Tensor], row: list[int]) -> list[Tensor]:
        attended = self.attended(layer, states, states, row)
        return [
            self.norm(layer + "attention.output.LayerNorm", new + old)
            for new, old in zip(attended, states, strict=True)
        ]

    def pair(
        self, target: list[int], source: list[int], entropy: str, ratio: float | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The last states of both sides."""
        t, s = self.embedded(target), self.embedded(source)
        for number in range(LAYERS):
            layer = f"{self.inner}encoder.layer.{number}."
            t, s = self.self_attention(layer, t, target), self.self_attention(layer, s, source)
            if number == MIXED_LAYER and entropy != "none":
                lam = (
                    self.lam(layer, t, s, target, source, entropy)
                    if ratio is None
                    else torch.tensor(ratio, dtype=torch.float64)
                )
                self.ratios.append(lam)
                crossed = self.attended(layer, t, s, source)
                t = [
                    self.norm(layer + "attention.output.LayerNorm", lam * new + (1 - lam) * old)
                    for new, old in zip(crossed, t, strict=True)
                ]
            t, s = self.feed_forward(layer, t), self.feed_forward(layer, s)
        return t, s

    def lam(
        self, layer: str, t: list[Tensor], s: list[Tensor], target: list[int], source: list[int], form: str
    ) -> Tensor:
        scores = self.scores(layer, t, s)
        transposed = [[[scores[h][i][j] for i in range(len(t))] for j in range(len(s))] for h in range(HEADS)]
        total = mean_entropy(scores, target, source, form) + mean_entropy(transposed, source, target, form)
        w, b = self.weights[layer + "mixup_ratio.w"], self.weights[layer + "mixup_ratio.b"]
        return LAM0 / (1 + torch.exp(-(w * total + b)))


def softmax(scores: dict[int, Tensor]) -> dict[int, Tensor]:
    total = sum(torch.exp(score) for score in scores.values())
    return {key: torch.exp(score) / total for key, score in scores.items()}


def mean_entropy(scores: list[list[list[Tensor]]], queries: list[int], keys: list[int], form: str) -> Tensor:
    """Of one direction: mean over heads and valid queries of the entropy over valid keys; or the authors' form."""
    found = []
    for head in range(HEADS):
        for i, token in enumerate(queries):
            row = scores[head][i]
            if form == "true" and token != PAD:
                probabilities = softmax({j: row[j] for j, key in enumerate(keys) if key != PAD})
                found.append(-sum(probability * torch.log(probability) for probability in probabilities.values()))
            if form == "authors":
                labels = softmax({j: row[j] + (-10000.0 if key == PAD else 0.0) for j, key in enumerate(keys)})
                logits = softmax({j: row[j] * (0.0 if key == PAD else 1.0) for j, key in enumerate(keys)})
                found.append(-sum(labels[j] * torch.log(logits[j]) for j in labels))
    return sum(found) / len(found)


def slow_head(slow: Slow, kind: str, states: list[Tensor]) -> list[Tensor]:
    """Class logits of the text (one) or of each position."""
    if kind == "qa":
        return [slow.linear("qa_outputs", state) for state in states]
    if kind == "tagging":
        return [slow.linear("classifier", state) for state in states]
    if slow.roberta:
        return [slow.linear("classifier.out_proj", torch.tanh(slow.linear("classifier.dense", states[0])))]
    return [slow.linear("classifier", torch.tanh(slow.linear("bert.pooler.dense", states[0])))]


def slow_side(kind: str, logits: list[Tensor], row: list[int], number: int, is_source: bool) -> Tensor:
    """The task loss of one side; `number` is the pair's."""
    classes = [float(c == HARD[number]) for c in range(CLASSES)] if is_source else SOFT[number]

    def against(logit: Tensor) -> Tensor:
        probabilities = softmax(dict(enumerate(logit)))
        return -sum(classes[c] * torch.log(probabilities[c]) for c in range(CLASSES))

    if kind == "classification":
        return against(logits[0])
    valid = [i for i, token in enumerate(row) if token != PAD]
    if kind == "tagging":  # words: the first two content tokens are one, the third another; the rest have no label
        words = [[1, 2], [3]] if len(valid) > 4 else [[1]]
        return sum(against(sum(logits[i] for i in word) / len(word)) for word in words) / n_words(is_source)
    start, end = SPANS[number][is_source]
    return -sum(
        torch.log(softmax({i: logits[i][which] for i in valid})[place]) / 2 for which, place in ((0, start), (1, end))
    )


def n_words(is_source: bool) -> float:
    """Words of a side over pairs: what the tagging loss is divided by, so that its mean over pairs is over words."""
    return sum(2 if len(pair[is_source]) > 2 else 1 for pair in PAIRS) / len(PAIRS)


def slow_loss(
    slow: Slow, kind: str, entropy: str, ratio: float | None = None, width: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """alpha * task(s) + (1 - alpha) * task(t) + consistency, mean over pairs; and the logits, row by row."""
    rows, n = rows_of(width), len(PAIRS)
    loss = torch.zeros((), dtype=torch.float64)
    logits: list[list[Tensor]] = [[] for _ in rows]
    for number in range(n):
        states = slow.pair(rows[number], rows[n + number], entropy, ratio)
        for side, row in enumerate((number, n + number)):
            logits[row] = slow_head(slow, kind, states[side])
            weight = ALPHA if side else 1 - ALPHA
            loss = loss + weight * slow_side(kind, logits[row], rows[row], number, bool(side)) / n
        vectors = []
        for side, row in enumerate((number, n + number)):
            content = [i for i, token in enumerate(rows[row]) if token not in (START, PAD, END)]
            mean = sum(states[side][i] for i in content) / len(content)
            vectors.append(states[side][0] if kind == "classification" else mean)
        loss = loss + sum((vectors[0][h] - vectors[1][h]) ** 2 for h in range(HIDDEN)) / HIDDEN / n
        if kind == "classification":
            p, q = (softmax(dict(enumerate(logits[row][0]))) for row in (n + number, number))
            loss = loss + sum(p[c] * torch.log(p[c] / q[c]) for c in range(CLASSES)) / n
    return loss, [torch.stack(row) for row in logits]


# --- the implementation under test -----------------------------------------------------------------------------------


def system_loss(
    model: PreTrainedModel, mixup: CrossLingualMixup, kind: str, mix: bool = True, width: int = 0
) -> tuple[Tensor, list[Tensor]]:
    ids = torch.tensor(rows_of(width))
    mask, n = (ids != PAD).long(), len(PAIRS)
    states = EncoderStates(model)
    with mixup.batch(mask, n, mix), states.batch() as captured:
        output = model(input_ids=ids, attention_mask=mask)
    states.remove()
    soft = torch.tensor(SOFT)
    hard = torch.nn.functional.one_hot(torch.tensor(HARD), CLASSES).float()
    content = content_mask(ids, mask, (START, END))
    vectors = representations(captured[LAYERS], None if kind == "classification" else content)
    rows = torch.arange(2 * n)
    if kind == "classification":
        losses = classification_losses(output.logits, torch.cat([soft, hard]), rows)
        weights = torch.full((2 * n,), 1 / n)
        logits = list(output.logits.unsqueeze(1))
    elif kind == "tagging":
        token_word, classes, sources = torch.full_like(ids, -1), [], []
        for row in range(2 * n):
            tokens = PAIRS[row % n][row // n]
            for positions in ([1, 2], [3]) if len(tokens) > 2 else ([1],):
                token_word[row, positions] = len(classes)
                classes.append(soft[row] if row < n else hard[row - n])
                sources.append(row >= n)
        losses = tagging_losses(output.logits, torch.stack(classes), token_word)
        number = torch.tensor([sources.count(side) for side in (False, True)])
        rows = torch.tensor(sources).long() * n
        weights = 1 / number[torch.tensor(sources).long()]
        logits = list(output.logits)
    else:
        spans = torch.tensor([SPANS[row % n][row // n] for row in range(2 * n)])
        losses = span_losses(output.start_logits, output.end_logits, mask, spans, rows)
        weights = torch.full((2 * n,), 1 / n)
        logits = list(torch.stack([output.start_logits, output.end_logits], dim=-1))
    shares = torch.where(rows < n, 1 - ALPHA, ALPHA) * weights
    both = consistency(vectors, n, output.logits if kind == "classification" else None)
    return (losses * shares).sum() + both.mean(), logits


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("entropy", ["true", "authors"])
@pytest.mark.parametrize("kind", list(AUTO))
@pytest.mark.parametrize("name", MODELS)
def test_one_stacked_forward_pass_equals_the_method(name: str, kind: str, entropy: str) -> None:
    model = tiny(name, kind)
    mixup = CrossLingualMixup(model, MIXED_LAYER, LAM0, entropy)
    with torch.no_grad():
        for parameter, value in zip(mixup.parameters(), (0.7, -0.4), strict=True):
            parameter.fill_(value)
    slow = Slow(model)
    expected, expected_logits = slow_loss(slow, kind, entropy)
    expected.backward()
    loss, logits = system_loss(model, mixup, kind)
    loss.backward()
    # losses are taken in fp32, whatever the model's format: the states themselves agree to fp64's rounding
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixup.last_ratio, torch.stack(slow.ratios).flatten().detach(), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(logits, expected_logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    found = gradients(model)
    for key, weight in slow.weights.items():
        wanted = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(found.get(key, torch.zeros_like(weight)), wanted, rtol=1e-5, atol=1e-6, msg=key)
    for last in ("w", "b"):
        assert found[f"{slow.inner}encoder.layer.{MIXED_LAYER}.mixup_ratio.{last}"].abs() > 1e-4


def test_a_fixed_ratio_is_used_unchanged() -> None:
    model = tiny("xlm-roberta", "classification")
    mixup = CrossLingualMixup(model, MIXED_LAYER, LAM0, ratio=0.35)
    assert not mixup.parameters()
    expected, expected_logits = slow_loss(Slow(model), "classification", "true", ratio=0.35)
    loss, logits = system_loss(model, mixup, "classification")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.stack(logits), torch.stack(expected_logits), rtol=1e-10, atol=1e-10)
    assert mixup.last_ratio.tolist() == [0.35] * len(PAIRS)


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_the_authors_ratio_and_not_ours(name: str) -> None:
    """Both equal the slow implementation, so the dependence on padding is a property of the authors' form."""
    for entropy in ("true", "authors"):
        model = tiny(name, "tagging")
        mixup = CrossLingualMixup(model, MIXED_LAYER, LAM0, entropy)
        narrow, narrow_logits = system_loss(model, mixup, "tagging")
        ratio = mixup.last_ratio
        wide, wide_logits = system_loss(model, mixup, "tagging", width=15)
        change = (mixup.last_ratio - ratio).abs().max()
        slow = Slow(model)
        slow_loss(slow, "tagging", entropy, width=15)
        torch.testing.assert_close(mixup.last_ratio, torch.stack(slow.ratios).flatten().detach())
        if entropy == "true":
            assert change < 1e-12
            torch.testing.assert_close(wide, narrow)
            for one, other in zip(wide_logits, narrow_logits, strict=True):
                valid = min(len(one), len(other)) - 5  # longest row 8 tokens; every row's first three are valid
                torch.testing.assert_close(one[:valid], other[:valid], rtol=1e-10, atol=1e-10)
        else:
            assert change > 1e-3


def test_the_parity_fails_without_mixing() -> None:
    """The comparison would show nothing if mixing hardly changed these logits."""
    model = tiny("xlm-roberta", "classification")
    mixup = CrossLingualMixup(model, MIXED_LAYER)
    mixed, plain = (torch.stack(system_loss(model, mixup, "classification", mix)[1]) for mix in (True, False))
    n = len(PAIRS)
    assert (mixed - plain)[:n].abs().amax(dim=(1, 2)).min() > 0.05
    torch.testing.assert_close(mixed[n:], plain[n:], rtol=0, atol=0)  # sources are not mixed


@pytest.mark.parametrize("name", MODELS)
def test_without_pairs_the_model_equals_plain_transformers(name: str) -> None:
    ids = torch.tensor(rows_of())
    mask = (ids != PAD).long()
    plain, model = tiny(name, "classification"), tiny(name, "classification")
    expected = plain(input_ids=ids, attention_mask=mask).logits
    expected.square().sum().backward()
    mixup = CrossLingualMixup(model, MIXED_LAYER)
    for n_pairs, mix in ((0, True), (len(PAIRS), False)):
        with mixup.batch(mask, n_pairs, mix):
            logits = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(logits, expected)
    logits.square().sum().backward()
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[key].grad, parameter.grad, rtol=0, atol=0)
    assert mixup.last_ratio is None
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)  # outside every batch
    mixup.remove()
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    """With dropout on; the backward pass runs after `batch()` was left, and after another batch."""
    found = []
    for checkpointing in (False, True):
        model = tiny(name, "classification", dropout=0.2).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        mixup = CrossLingualMixup(model, MIXED_LAYER)
        torch.manual_seed(11)
        loss, _ = system_loss(model, mixup, "classification")
        other, _ = system_loss(model, mixup, "classification", mix=False)
        loss.backward()
        other.backward()
        found.append((loss.item(), gradients(model)))
    assert found[0][0] == found[1][0]
    assert found[0][1].keys() == found[1][1].keys()
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], gradient, rtol=1e-12, atol=1e-12, msg=key)


def kept_bytes(model: PreTrainedModel, mixup: CrossLingualMixup | None, mask: Tensor, ids: Tensor) -> int:
    """What a forward pass keeps for its backward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if mixup is None:
            output = model(input_ids=ids, attention_mask=mask)
        else:
            with mixup.batch(mask, len(PAIRS)):
                output = model(input_ids=ids, attention_mask=mask)
    assert output.logits.requires_grad
    return sum(kept.values())


def test_the_mixed_layer_is_checkpointed_like_the_others() -> None:
    ids = torch.tensor(rows_of())
    mask = (ids != PAD).long()
    kept = {}
    for checkpointing in (False, True):
        for mixing in (False, True):
            model = tiny("xlm-roberta", "classification").train()
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            mixup = CrossLingualMixup(model, MIXED_LAYER) if mixing else None
            kept[checkpointing, mixing] = kept_bytes(model, mixup, mask, ids)
    assert kept[False, True] > kept[False, False] > kept[True, False]
    assert kept[True, True] == kept[True, False]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_attention_implementation_gives_the_same_result(attention: str) -> None:
    models = [tiny("bert", "qa", kind) for kind in ("sdpa", attention)]
    losses = [system_loss(model, CrossLingualMixup(model, MIXED_LAYER), "qa")[0] for model in models]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)


def test_mixing_with_lora_equals_mixing_with_merged_weights() -> None:
    """PEFT wraps query and value; the mixed layer calls the wrapped modules, in both of their uses."""
    model = tiny("xlm-roberta", "classification")
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, target_modules=["query", "value"])).double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.4)
    mixup = CrossLingualMixup(model, MIXED_LAYER)
    assert [parameter.requires_grad for parameter in mixup.parameters()] == [True, True]
    loss, logits = system_loss(model, mixup, "classification")
    loss.backward()
    trained = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {key for key, _ in model.named_parameters() if "lora_" in key or "mixup_ratio" in key}
    slow_losses = []
    for merged in (True, False):
        mixup.remove()
        plain = model.merge_and_unload() if merged else tiny("xlm-roberta", "classification")
        mixup = CrossLingualMixup(plain, MIXED_LAYER)
        slow_losses.append(slow_loss(Slow(plain), "classification", "true"))
    torch.testing.assert_close(torch.stack(logits), torch.stack(slow_losses[0][1]), rtol=1e-10, atol=1e-10)
    assert abs(slow_losses[1][0] - loss) > 1e-2  # the adapters have an effect


@pytest.mark.parametrize("name", MODELS)
def test_mixing_in_each_number_format(name: str) -> None:
    """fp32 and bf16 against fp64; entropies and ratios are at least fp32."""
    exact = tiny(name, "classification")
    mixup = CrossLingualMixup(exact, MIXED_LAYER)
    wanted, wanted_logits = system_loss(exact, mixup, "classification")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        model = tiny(name, "classification").to(dtype)
        other = CrossLingualMixup(model, MIXED_LAYER)
        assert {parameter.dtype for parameter in other.parameters()} == {dtype}
        loss, logits = system_loss(model, other, "classification")
        loss.backward()
        assert other.last_ratio.dtype == torch.float32
        assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
        scale = torch.stack(wanted_logits).abs().max()
        difference = (torch.stack(logits).double() - torch.stack(wanted_logits)).abs().max() / scale
        assert difference < tolerance
        assert (other.last_ratio.double() - mixup.last_ratio).abs().max() < tolerance / 5
        assert abs(loss.item() - wanted.item()) < tolerance * abs(wanted.item()) * 3
