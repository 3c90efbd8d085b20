"""Captures hidden states of an encoder during its forward pass.

By default these are the last states, the input of the head.

Shapes: R rows, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from modeling.errors import ModelError
from modeling.layers import decoder_layers, state_hook


class EncoderStates:
    """Captures the states of the forward pass inside `batch()`; does nothing outside it:

    with states.batch() as captured:
        logits = model(...).logits
    hidden_RTH = captured[states.last]
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] | None = None) -> None:
        """Installs the hooks.

        Args:
            model: bare or wrapped.
            layers: the l of each h[l], from 0 (embeddings) to the number of layers (`last`).

        Raises:
            ModelError: a layer does not exist.
        """
        self.last = len(decoder_layers(model))
        self.layers = (self.last,) if layers is None else tuple(layers)
        self._captured: dict[int, Tensor] | None = None
        self._handles = [state_hook(model, layer, self._capturer(layer)) for layer in self.layers]

    @contextmanager
    def batch(self) -> Iterator[dict[int, Tensor]]:
        """Yields a dict that the one forward pass inside fills with h[l], (R, T, H) in the model's own dtype.

        Raises:
            ModelError: a second forward pass runs inside; or on leaving, none did.
        """
        captured: dict[int, Tensor] = {}
        self._captured = captured
        try:
            yield captured
        finally:
            self._captured = None
        if len(captured) < len(self.layers):
            raise ModelError("no forward pass ran inside the batch, so there are no encoder states")

    def remove(self) -> None:
        """Removes the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def _capturer(self, layer: int) -> Callable[[Tensor], None]:
        def capture(hidden_RTH: Tensor) -> None:
            if self._captured is not None:
                if layer in self._captured:
                    raise ModelError("a second forward pass inside one batch of encoder states: open a batch for each")
                self._captured[layer] = hidden_RTH

        return capture
