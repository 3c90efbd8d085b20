"""Model FLOPs of a training step of a decoder, for MFU.

MFU is the model's FLOPs of a step, of forward and backward without recomputation, divided by its seconds and the peak
of the devices (`--peak-tflops` of `gpu.py`: 790 for an H200, below the 989 of its data sheet). The FLOPs are

    6 L N T + 6 L A sum(s (s + 1)) + 6 V H n

N weights of a layer's matrices, T tokens without padding, L layers, A heads times head size, s the length of each
sample, V vocabulary, H hidden size, n label tokens. The head counts for label tokens only, as crosslift computes no
other logits; a token attends to itself and those before it in its own sample only. So nothing that is not computed for
a result raises the figure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a decoder's FLOPs depend on."""

    layers: int
    layer_weights: int  # elements of the matrices of one layer
    attention_width: int  # heads x head size
    hidden: int
    vocabulary: int

    def step_flops(self, lengths: Iterable[int], labels: int) -> float:
        """FLOPs of forward and backward over samples of these lengths, of whose tokens `labels` meet the head."""
        lengths = list(lengths)
        matrices = 6 * sum(lengths) * self.layers * self.layer_weights
        attention = 6 * self.layers * self.attention_width * sum(s * (s + 1) for s in lengths)
        return float(matrices + attention + 6 * self.vocabulary * self.hidden * labels)


def model_shape(model: Any) -> ModelShape:
    """The shape of a decoder, whose weights may be on the meta device but not sharded."""
    from modeling.layers import decoder_layers

    config, layers = model.config, decoder_layers(model)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = sum(each.numel() for each in layers[0].parameters() if each.ndim == 2)
    width = config.num_attention_heads * head_size
    return ModelShape(len(layers), weights, width, config.hidden_size, config.vocab_size)
