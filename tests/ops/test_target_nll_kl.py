"""The loss and its gradient against plain autograd over all logits."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from lightedit.ops import Head, target_nll_kl

OP = "target_nll_kl"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


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


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "k"), [(1, 0), (0, 1), (5, 3), (128, 4), (126, 300), (300, 0)])
def test_equals_autograd(
    device: torch.device, m: int, k: int, bias: bool, softcap: float | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(m + k)
    given = {"dtype": dtype, "device": device}
    weight = torch.randn(97, 16, **given)
    head = Head(weight, torch.randn(97, **given) if bias else None, softcap)
    hidden = torch.randn(m + k, 16, **given)
    targets = torch.randint(97, (m,), device=device)
    reference = torch.randn(k, 97, **given).log_softmax(-1)
    weights = torch.randn(m + k, **given)
    one, other = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    (loss, is_argmax), expected = target_nll_kl(one, head, targets, reference), plain(other, head, targets, reference)
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(loss, expected, **tolerance)
    assert is_argmax.equal(head.log_probs(hidden[:m]).argmax(-1) == targets)
    torch.testing.assert_close(one.grad, other.grad, **tolerance)


def test_bfloat16_states_give_a_float32_loss(device: torch.device) -> None:
    torch.manual_seed(0)
    head = Head(torch.randn(97, 16, device=device).bfloat16())
    hidden = torch.randn(9, 16, device=device).bfloat16().requires_grad_()
    targets = torch.randint(97, (6,), device=device)
    reference = torch.randn(3, 97, device=device).log_softmax(-1)
    loss, _ = target_nll_kl(hidden, head, targets, reference)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, plain(hidden, head, targets, reference), rtol=1e-5, atol=1e-5)


def test_improbable_targets_and_large_logits_stay_finite(device: torch.device) -> None:
    head = Head(torch.tensor([[1.0], [-1.0], [0.5]], device=device))
    hidden = torch.tensor([[3e4], [-3e4]], device=device, requires_grad=True)
    loss, _ = target_nll_kl(hidden, head, torch.tensor([1, 0], device=device), torch.empty(0, 3, device=device))
    loss.sum().backward()
    assert loss.tolist() == [6e4, 6e4]
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()


def test_log_probs() -> None:
    head = Head(torch.randn(11, 4), softcap=2.0)
    hidden = torch.randn(3, 4)
    expected = (2 * torch.tanh(hidden @ head.weight.T / 2)).log_softmax(-1)
    torch.testing.assert_close(head.log_probs(hidden), expected)


def test_a_state_that_is_nan_spoils_its_own_position_only(device: torch.device) -> None:
    head, hidden = Head(torch.randn(11, 4, device=device)), torch.randn(5, 4, device=device)
    hidden[3, 2] = torch.nan
    reference = torch.randn(3, 11, device=device).log_softmax(-1)
    loss, _ = target_nll_kl(hidden.requires_grad_(), head, torch.tensor([1, 2], device=device), reference)
    loss.sum().backward()
    assert hidden.grad is not None
    assert loss.isnan().tolist() == hidden.grad.isnan().all(1).tolist() == [False, False, False, True, False]
    assert hidden.grad[[0, 1, 2, 4]].isfinite().all()


def test_no_positions_give_no_losses(device: torch.device) -> None:
    none, head = torch.zeros(0, 4, device=device), Head(torch.zeros(11, 4, device=device))
    loss, is_argmax = target_nll_kl(none, head, none[:, 0].long(), torch.zeros(0, 11, device=device))
    assert loss.shape == is_argmax.shape == (0,)


def test_a_second_derivative_is_refused(device: torch.device) -> None:
    hidden, head = torch.randn(3, 4, device=device, requires_grad=True), Head(torch.randn(11, 4, device=device))
    reference = torch.randn(2, 11, device=device).log_softmax(-1)
    loss, _ = target_nll_kl(hidden, head, torch.tensor([1], device=device), reference)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(loss.sum(), hidden, create_graph=True)[0].sum().backward()


HEAD, IDS, KNOWN = Head(torch.zeros(9, 5)), torch.zeros(2).long(), torch.zeros(1, 9)


@pytest.mark.parametrize(
    ("hidden", "head", "targets", "reference", "message"),
    [
        (torch.zeros(4, 5), HEAD, IDS, KNOWN, r"hidden \[m \+ k, d\].*\[4, 5\]"),
        (torch.zeros(3, 6), HEAD, IDS, KNOWN, r"got \[3, 6\], \[9, 5\]"),
        (torch.zeros(3, 5), HEAD, IDS, torch.zeros(1, 8), r"\[1, 8\]"),
        (torch.zeros(3, 5), Head(HEAD.weight, torch.zeros(8)), IDS, KNOWN, r"a bias of \[8\]"),
        (torch.zeros(3, 5).half(), HEAD, IDS, KNOWN, "float16.*float32"),
        (torch.zeros(3, 5), HEAD, IDS.float(), KNOWN, "targets are int64"),
        (torch.zeros(3, 5), HEAD, IDS, KNOWN.half(), "reference is float32"),
    ],
)
def test_what_does_not_fit_is_refused(
    hidden: Tensor, head: Head, targets: Tensor, reference: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        target_nll_kl(hidden, head, targets, reference)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(device: torch.device, with_bias: bool, softcap: float | None) -> None:
    hidden, weight = torch.randn(9, 5, device=device, requires_grad=True), torch.randn(11, 5, device=device)
    bias = torch.randn(11, device=device) if with_bias else None
    unedited = torch.randn(3, 11, device=device).log_softmax(-1)
    inputs = (hidden, weight, bias, softcap, torch.randint(11, (6,), device=device), unedited)
    opcheck(torch.ops.lightedit.target_nll_kl.default, inputs)
