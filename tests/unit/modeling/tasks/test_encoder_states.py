"""Encoder states equal those that transformers reports, with gradients, checkpointed or not."""

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForTokenClassification, PreTrainedModel

from modeling.errors import ModelError
from modeling.tasks.encoder_states import EncoderStates

IDS = torch.arange(4, 16).view(2, 6)
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])


def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name, vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=1,
    )  # fmt: skip
    return AutoModelForTokenClassification.from_config(config)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta"])
def test_states_of_the_forward_pass_in_a_batch_are_kept(name: str, checkpointing: bool) -> None:
    model = tiny(name)
    reported = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    every = EncoderStates(model, range(4))
    last = EncoderStates(model)
    with every.batch() as captured, last.batch() as final:
        model(input_ids=IDS, attention_mask=MASK)
    assert (every.last, last.layers, sorted(captured)) == (3, (3,), [0, 1, 2, 3])
    for layer in range(4):
        assert torch.equal(captured[layer], reported[layer])
    assert torch.equal(final[3], reported[3])

    def gradient(state: Tensor) -> Tensor:
        model.zero_grad()
        state.square().sum().backward()
        return model.get_input_embeddings().weight.grad

    torch.testing.assert_close(gradient(final[3]), gradient(reported[3]))


def test_no_states_are_kept_outside_a_batch_and_misuse_is_refused() -> None:
    model = tiny("bert").eval()
    states = EncoderStates(model)
    with states.batch() as captured:
        model(input_ids=IDS)
    kept = captured[3]
    model(input_ids=IDS + 1)
    assert captured[3] is kept
    with states.batch():
        model(input_ids=IDS)
        with pytest.raises(ModelError, match="a second forward pass"):
            model(input_ids=IDS)
    with pytest.raises(ModelError, match="no forward pass ran inside"), states.batch():
        pass
    with pytest.raises(ModelError, match="layer 4 does not exist"):
        EncoderStates(model, [4])
    states.remove()
    with pytest.raises(ModelError, match="no forward pass ran inside"), states.batch():
        model(input_ids=IDS)
