"""Chooses the layout of batches: samples packed end to end in rows, or one padded row each.

Some model classes ignore position ids that restart within a row (BLOOM, OPT, MPT; Falcon before transformers 5.24). So
`packed` is chosen only if a tiny model of the same class, given packed rows, computes the logits that it computes for
the samples one by one.

Shapes: T tokens of one sample, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from modeling.weights.weight_files import one_line

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # relative, in fp32; samples that attend to each other differ by about 50 %
TOLERANCE_BF16 = 3e-2  # flash-attn has no fp32
VOCABULARY = 64
SAMPLE_LENGTHS = (7, 3, 12, 1, 9)
WINDOW = 5  # shorter than the longer samples, so that sliding windows take effect
EXPERTS = 16  # more than any router selects per token
MAX_LAYERS = 8
SMALL = {
    "vocab_size": VOCABULARY,
    "num_attention_heads": 2,
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("sliding_window", "window_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # theirs exceed a small vocabulary
}


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """A layout and its reason.

    Attributes:
        layout: packed or padded.
        max_difference: of packed and single logits, relative to the largest logit; None if packed did not run.
        reason: for the log.
    """

    layout: Literal["packed", "padded"]
    max_difference: float | None
    reason: str


def choose_layout(config: PreTrainedConfig, attention: str) -> LayoutChoice:
    """Packed if a tiny random model of this class keeps packed samples apart, else padded.

    The model runs in fp32 on the CPU, with flash_attention_2 in bf16 on the GPU. The random state does not change. A
    class that cannot be made small, or that fails on packed rows, gets padded batches, which are exact for every class.

    Args:
        config: of the model to train.
        attention: a name that `resolve_attention` returned.
    """
    flash = attention == "flash_attention_2"
    tolerance = TOLERANCE_BF16 if flash else TOLERANCE
    device, dtype = ("cuda", torch.bfloat16) if flash else ("cpu", torch.float32)
    try:
        model: nn.Module = tiny_model(config, attention)
        difference = packing_difference(model.to(device=device, dtype=dtype))
    except Exception as error:  # each class fails in its own way; padded is then right
        reason = f"a tiny {config.model_type} did not run packed: {one_line(error)}"
        choice = LayoutChoice("padded", None, reason)
    else:
        reason = (
            f"packed logits of a tiny {config.model_type} differ from single ones by {difference:.1e}; "
            f"{tolerance:.0e} is allowed"
        )
        choice = LayoutChoice("packed" if difference <= tolerance else "padded", difference, reason)
    logger.info("layout %s with %s attention: %s", choice.layout, attention, choice.reason)
    return choice


def tiny_model(
    config: PreTrainedConfig,
    attention: str,
    auto: Any = AutoModelForCausalLM,
    pad_token_id: int | None = None,
    all_layers: bool = False,
) -> PreTrainedModel:
    """A small random model of the config's class, in eval mode, whose logits depend clearly on its attention.

    Args:
        auto: transformers' class that makes it.
        pad_token_id: encoders need one.
        all_layers: see `tiny_config`.
    """
    tiny = tiny_config(config, all_layers)
    tiny.get_text_config(decoder=True).pad_token_id = pad_token_id
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = auto.from_config(tiny, dtype=torch.float32, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:  # with the usual 0.02, attention hardly changes the logits
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def tiny_config(config: PreTrainedConfig, all_layers: bool = False) -> PreTrainedConfig:
    """The config with small sizes: one layer of each kind, or all; head size and position encoding unchanged."""
    tiny = copy.deepcopy(config)
    text = tiny.get_text_config(decoder=True)
    heads = text.num_attention_heads
    grouped = (getattr(text, "num_key_value_heads", None) or heads) < heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    if not all_layers:
        _keep_layers(text)
    small: dict[str, Any] = {
        **SMALL,
        "num_key_value_heads": 1 if grouped else 2,
        "hidden_size": 2 * head_size,
    }
    for name, value in small.items():
        if getattr(text, name, None) is not None:  # a model without windows or experts gets none
            setattr(text, name, value)
    return tiny


def _keep_layers(text: PreTrainedConfig) -> None:
    """Reduces the layers to one of each kind, at least two, and the config's per-layer lists with them."""
    number = text.num_hidden_layers
    lists = {name: value for name, value in vars(text).items() if isinstance(value, list)}
    per_layer = {name: value for name, value in lists.items() if len(value) == number}
    first: dict[str, int] = {}
    for layer in range(number):
        first.setdefault(str([value[layer] for value in per_layer.values()]), layer)
    kept = list(first.values())[:MAX_LAYERS]
    kept += [layer for layer in range(number) if layer not in kept][: max(0, 2 - len(kept))]
    for name, value in per_layer.items():
        setattr(text, name, [value[layer] for layer in sorted(kept)])
    text.num_hidden_layers = len(kept)


@torch.no_grad()
def packing_difference(model: nn.Module) -> float:
    """Largest difference of logits, packed in one row against one by one, relative to the largest logit."""
    generator, device = torch.Generator().manual_seed(1), next(model.parameters()).device
    samples = [torch.randint(VOCABULARY, (length,), generator=generator) for length in SAMPLE_LENGTHS]

    def logits(samples: list[Tensor]) -> Tensor:
        positions = torch.cat([torch.arange(len(sample)) for sample in samples])
        output = model(
            input_ids=torch.cat(samples)[None].to(device),
            attention_mask=None,  # the three arguments with which transformers keeps packed samples apart
            position_ids=positions[None].to(device),
            use_cache=False,
        )
        return output.logits[0].float()

    single = torch.cat([logits([sample]) for sample in samples])
    return float((logits(samples) - single).abs().max() / single.abs().max())
