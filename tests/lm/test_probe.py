"""Token factors of gradients, against autograd's own gradients of the weights."""

import pytest
import torch
from torch import Tensor

from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import pad
from tests.lm.places import MODELS, ROWS, language_model, matrices, rows_of


def loss(lm: LanguageModel) -> Tensor:
    logits = lm.forward(pad(ROWS, lm.pad_id)).log_softmax(-1)
    return -(logits[0, :4, 7].sum() + logits[1, 0, 9] + logits[2, :, 11].sum())


@pytest.mark.parametrize("architecture", MODELS)
def test_token_factors_give_the_gradient_of_every_matrix_and_bias(architecture: str) -> None:
    lm = language_model(architecture, torch.float64)
    where = matrices(lm)
    with lm.probe(where) as probes:
        loss(lm).backward()
    for place in where:
        module = lm.module(place)
        module.requires_grad_(True)
    loss(lm).backward()
    for place in where:
        module, rows, factors = lm.module(place), rows_of(lm, place), probes[place]
        assert factors.grads.shape[:2] == factors.inputs.shape[:2] == (3, 7)
        exact = module.weight.grad.T if type(module).__name__ == "Conv1D" else module.weight.grad
        found = torch.einsum("bto,bti->oi", factors.grads, factors.inputs)
        torch.testing.assert_close(found, exact[rows], atol=1e-9, rtol=1e-9)
        assert found.abs().max() > 1e-6
        if getattr(module, "bias", None) is not None:
            torch.testing.assert_close(factors.grads.sum((0, 1)), module.bias.grad[rows], atol=1e-9, rtol=1e-9)
        assert not factors.grads[1, 1:].any()  # padding


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bloom", "phi3"])
def test_a_probe_changes_no_bit_and_leaves_no_weight_with_a_gradient(architecture: str) -> None:
    lm = language_model(architecture)
    where = [*matrices(lm), Place(1, "attention"), Place(1, "block"), Place(0, "embedding")]
    with torch.no_grad():
        plain = loss(lm)
    with lm.probe(where) as probes:
        probed = loss(lm)
    assert torch.equal(plain, probed.detach())
    probed.backward()  # outside the context
    assert all(probe.grads.any() for probe in probes.values())
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_a_probe_of_a_block_gives_the_gradient_of_the_residual_stream() -> None:
    lm = language_model("falcon", torch.float64)
    place = Place(1, "block")
    with lm.capture([place], 3) as states:
        loss(lm)
    hidden = states[place].requires_grad_()
    with lm.starting_at(2, hidden):
        loss(lm).backward()
    with lm.probe([place]) as probes:
        loss(lm).backward()
    torch.testing.assert_close(probes[place].grads, hidden.grad, atol=1e-10, rtol=1e-10)


def test_a_probe_that_no_pass_reached_says_so() -> None:
    lm = language_model("llama")
    with lm.probe([Place(1)]) as probes:
        with pytest.raises(RuntimeError, match="no forward pass reached"):
            _ = probes[Place(1)].inputs
        with torch.no_grad():
            loss(lm)
        assert probes[Place(1)].inputs.shape == (3, 7, 80)
        with pytest.raises(RuntimeError, match="no backward pass reached"):
            _ = probes[Place(1)].grads
