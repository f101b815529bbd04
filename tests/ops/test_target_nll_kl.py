"""The loss and its gradient against plain autograd over all logits."""

import pytest
import torch
from torch.nn import functional as F

from lightedit.ops import Head, target_nll_kl


def plain(hidden, head, targets, reference):
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    log_p = logits.to(reference.dtype).log_softmax(-1)
    m = len(targets)
    kl = F.kl_div(reference, log_p[m:], log_target=True, reduction="none").sum(-1)
    return torch.cat([-log_p[:m].gather(1, targets[:, None])[:, 0], kl])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "k"), [(1, 0), (0, 1), (5, 3), (128, 4), (126, 300), (300, 0)])
def test_equals_autograd(m: int, k: int, bias: bool, softcap: float | None) -> None:
    torch.manual_seed(m + k)
    weight = torch.randn(97, 16, dtype=torch.float64)
    head = Head(weight, torch.randn(97, dtype=torch.float64) if bias else None, softcap)
    hidden = torch.randn(m + k, 16, dtype=torch.float64)
    targets = torch.randint(97, (m,))
    reference = torch.randn(k, 97, dtype=torch.float64).log_softmax(-1)
    weights = torch.randn(m + k, dtype=torch.float64)
    one, other = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    (loss, leads), expected = target_nll_kl(one, head, targets, reference), plain(other, head, targets, reference)
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert leads.equal(head.log_probs(hidden[:m]).argmax(-1) == targets)
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)


def test_bfloat16_states_give_a_float32_loss() -> None:
    torch.manual_seed(0)
    head = Head(torch.randn(97, 16).bfloat16())
    hidden = torch.randn(9, 16).bfloat16().requires_grad_()
    targets, reference = torch.randint(97, (6,)), torch.randn(3, 97).log_softmax(-1)
    loss, _ = target_nll_kl(hidden, head, targets, reference)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, plain(hidden, head, targets, reference), rtol=1e-5, atol=1e-5)


def test_improbable_targets_and_large_logits_stay_finite() -> None:
    head = Head(torch.tensor([[1.0], [-1.0], [0.5]]))
    hidden = torch.tensor([[3e4], [-3e4]], requires_grad=True)
    loss, _ = target_nll_kl(hidden, head, torch.tensor([1, 0]), torch.empty(0, 3))
    loss.sum().backward()
    assert loss.tolist() == [6e4, 6e4]
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()


def test_log_probs() -> None:
    head = Head(torch.randn(11, 4), softcap=2.0)
    hidden = torch.randn(3, 4)
    expected = (2 * torch.tanh(hidden @ head.weight.T / 2)).log_softmax(-1)
    torch.testing.assert_close(head.log_probs(hidden), expected)
