"""X-Mixup's hooks: which modules they call, which models they refuse. Numbers: tests/parity/test_xmixup.py."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from modeling.errors import ModelError
from modeling.weights.weight_files import directory_hash
from modeling.xmixup.mixup import MODEL_TYPES, CrossLingualMixup, encoder_layers
from modeling.xmixup.mixup_state import MIXUP_FILE, is_mixup_weight

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 32, "initializer_range": 0.3, "pad_token_id": 1,
}  # fmt: skip
IDS = torch.arange(4, 28).view(4, 6)
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0], [1] * 3 + [0] * 3])


def tiny(name: str = "xlm-roberta") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(name, **SIZES)).eval()


def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=IDS, attention_mask=MASK).logits


def test_no_module_runs_twice_on_the_same_rows() -> None:
    """Self-attention's projections on all rows once, the cross-attention's on one side each, one feed-forward pass."""
    model = tiny()
    mixup = CrossLingualMixup(model, 1)
    layer = model.roberta.encoder.layer[1]
    rows: dict[str, list[int]] = {}
    for name, module in layer.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _, args, __, name=name: rows.setdefault(name, []).append(len(args[0])))
    with mixup.batch(MASK, 2):
        logits(model)
    both = ("self.query", "self.key", "self.value", "output.dense", "output.dropout", "output.LayerNorm")
    assert [rows[f"attention.{name}"] for name in both] == [[4, 2]] * len(both)
    assert rows["attention.self.dropout"] == [2]  # sdpa applies its own dropout
    assert rows["intermediate.dense"] == rows["output.dense"] == rows["output.LayerNorm"] == [4]


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_only_targets_change_and_only_inside_a_batch(name: str) -> None:
    model = tiny(name)
    plain = logits(model)
    mixup = CrossLingualMixup(model, 1)
    with mixup.batch(MASK, 2):
        mixed = logits(model)
    assert (mixed - plain)[:2].abs().amax(dim=1).min() > 1e-3
    assert torch.equal(mixed[2:], plain[2:])
    assert torch.equal(logits(model), plain)
    assert mixup.last_ratio is not None
    assert mixup.last_ratio.shape == (2,)
    assert ((mixup.last_ratio > 0.25) & (mixup.last_ratio < 0.5)).all()  # w = 1, b = 0, entropies above 0
    assert not mixup.last_ratio.requires_grad


def test_the_ratio_of_a_pair_does_not_depend_on_other_pairs() -> None:
    model = tiny()
    mixup = CrossLingualMixup(model, 0)
    with mixup.batch(MASK, 2):
        together = logits(model)
    ratios = mixup.last_ratio
    for pair in (0, 1):
        rows = [pair, 2 + pair]
        with mixup.batch(MASK[rows], 1):
            alone = model(input_ids=IDS[rows], attention_mask=MASK[rows]).logits
        torch.testing.assert_close(alone, together[rows], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mixup.last_ratio, ratios[pair : pair + 1])
    assert ratios[0] != ratios[1]


@pytest.mark.parametrize("layer", [0, 2])
def test_only_the_chosen_layer_mixes(layer: int) -> None:
    model = tiny()
    mixup = CrossLingualMixup(model, layer)
    with mixup.batch(MASK, 2):
        mixed = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
    plain = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
    for place in range(4):
        assert torch.equal(mixed[place], plain[place]) == (place <= layer)


def test_batches_of_pairs_without_content_are_finite() -> None:
    """An idle micro-batch of one pair of one token, and a row of padding only."""
    model = tiny().train()
    mixup = CrossLingualMixup(model, 1)
    for mask in (torch.ones(2, 1, dtype=torch.long), torch.tensor([[1, 1], [0, 0]])):
        with mixup.batch(mask, 1):
            out = model(input_ids=torch.full_like(mask, 5), attention_mask=mask).logits
        (out.sum() * 0.0).backward()
        assert out.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_batches_of_another_shape_are_refused() -> None:
    model = tiny()
    mixup = CrossLingualMixup(model, 1)
    with pytest.raises(ModelError, match="3 pairs are 6 rows, but the mask has 4"), mixup.batch(MASK, 3):
        pass
    with pytest.raises(ModelError, match="no forward pass reached the mixed layer"), mixup.batch(MASK, 2):
        pass
    with pytest.raises(ModelError, match=r"forward pass of \(2, 6\)"), mixup.batch(MASK, 2):
        model(input_ids=IDS[:2], attention_mask=MASK[:2])
    logits(model)  # no state of the failed batches is left
    with mixup.batch(MASK, 0):
        pass


def test_invalid_settings_are_refused() -> None:
    model = tiny()
    for settings, message in [
        ({"layer": 3}, r"layer 3 does not exist: the model has layers 0\.\.2"),
        ({"layer": -1}, "layer -1 is not 0 or more"),
        ({"layer": 1, "lam0": 1.5}, "lam0 1.5 is not in"),
        ({"layer": 1, "entropy": "half"}, "entropy 'half' is not one of true, authors"),
        ({"layer": 1, "ratio": "fixed"}, "ratio 'fixed' is neither"),
        ({"layer": 1, "ratio": 1.01}, "ratio 1.01 is neither"),
    ]:
        with pytest.raises(ModelError, match=message):
            CrossLingualMixup(model, **settings)
    assert not [name for name, _ in model.named_parameters() if "mixup" in name]
    mixup = CrossLingualMixup(model, 1)
    with pytest.raises(ModelError, match="layer 1 already has X-Mixup hooks"):
        CrossLingualMixup(model, 1)
    mixup.remove()
    CrossLingualMixup(model, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("xlm-roberta-xl", "xlm-roberta-xl is pre-LN"),
        ("roberta-prelayernorm", "roberta-prelayernorm is pre-LN"),
        ("megatron-bert", "megatron-bert is pre-LN"),
        ("deberta-v2", r"the layers of deberta-v2 have no attention\.self\.query"),
        ("distilbert", r"the layers of distilbert have no attention\.self\.query"),
        ("convbert", "the attention of convbert has not been tested with the method"),
        ("llama", r"the layers of llama have no attention\.self\.query"),
    ],
)
def test_unsupported_models_are_refused_with_the_reason(name: str, message: str) -> None:
    sizes = {**SIZES, "embedding_size": 16} if name == "convbert" else SIZES
    model = AutoModel.from_config(AutoConfig.for_model(name, **sizes))
    with pytest.raises(ModelError, match=message) as caught:
        encoder_layers(model)
    assert "take one of bert, camembert" in str(caught.value)


def test_a_bert_with_is_decoder_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **SIZES, is_decoder=True))
    with pytest.raises(ModelError, match="this bert is a decoder"):
        CrossLingualMixup(model, 1)


def exported(model: PreTrainedModel, mixup: CrossLingualMixup, directory: Path) -> None:
    """Save plain weights and, in a separate file, X-Mixup's learned values, as an export does."""
    state = model.state_dict()
    learned = {name.rpartition(".")[2]: float(value) for name, value in state.items() if is_mixup_weight(name)}
    assert learned == {"w": 1.75, "b": -0.5}
    plain = {name: value for name, value in state.items() if not is_mixup_weight(name)}
    model.save_pretrained(directory, state_dict=plain)
    mixup.state(directory_hash(directory)).save(directory / MIXUP_FILE)


def test_a_reopened_export_mixes_as_before(tmp_path: Path) -> None:
    model = tiny()
    mixup = CrossLingualMixup(model, 1, lam0=0.75, entropy="authors")
    with torch.no_grad():
        for parameter, value in zip(mixup.parameters(), (1.75, -0.5), strict=True):
            parameter.fill_(value)
    with mixup.batch(MASK, 2):
        expected = logits(model)
    exported(model, mixup, tmp_path / "export")
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    again = CrossLingualMixup.attach(loaded.eval(), tmp_path / "export")
    with again.batch(MASK, 2):
        assert torch.equal(logits(loaded), expected)
    assert again.state() == mixup.state()
    # the state file of other weights is refused
    with torch.no_grad():
        loaded.roberta.encoder.layer[0].output.dense.bias[-1] += 1
    again.remove()
    loaded.save_pretrained(tmp_path / "export")
    with pytest.raises(ModelError, match="belongs to other weights"):
        CrossLingualMixup.attach(loaded, tmp_path / "export")
    (tmp_path / "export" / MIXUP_FILE).unlink()
    with pytest.raises(ModelError, match=r"xmixup\.safetensors: no usable X-Mixup state"):
        CrossLingualMixup.attach(loaded, tmp_path / "export")


def test_a_fixed_ratio_has_no_parameters_and_is_saved(tmp_path: Path) -> None:
    model = tiny()
    names = list(model.state_dict())
    mixup = CrossLingualMixup(model, 1, ratio=0.25)
    assert list(model.state_dict()) == names
    mixup.state("abc").save(tmp_path / MIXUP_FILE)
    again = CrossLingualMixup.from_state(tiny(), type(mixup.state()).load(tmp_path / MIXUP_FILE))
    assert again.state("abc") == mixup.state("abc")
    assert again.state().ratio == 0.25
