"""weight + left rightᵀ with one rounding, against float64."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from lightedit.ops import add_low_rank_, implementations

OP = "add_low_rank_"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def factors(d_out: int, d_in: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randn(d_out, rank, device=device), torch.randn(d_in, rank, device=device)


def assert_rounded_once(weight: Tensor, exact: Tensor, slack: float = 2e-5) -> None:
    """Within half a unit in the last place of `exact`, but for what the float32 sum is off."""
    half = torch.finfo(weight.dtype).eps / 2
    assert ((weight.double() - exact).abs() <= half * exact.abs() * 1.001 + slack).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 63])
@pytest.mark.parametrize("shape", [(1, 1), (63, 1000), (1000, 63), (130, 5000), (0, 5), (5, 0)])
def test_equals_the_sum_rounded_once(
    device: torch.device, shape: tuple[int, int], rank: int, dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, device=device).to(dtype)
    left, right = factors(*shape, rank, device)
    exact = weight.double() + left.double() @ right.double().T
    add_low_rank_(weight, left, right)
    assert weight.dtype == dtype
    assert_rounded_once(weight, exact)


def test_many_terms_of_one_sign_add_up(device: torch.device) -> None:
    """Of a sum that is cut off with every term, instead of rounded, some 2^-25 would be lost each time."""
    left, right = torch.rand(70, 4096, device=device), torch.rand(140, 4096, device=device)
    weight = torch.zeros(70, 140, device=device)
    add_low_rank_(weight, left, right)
    exact = left.double() @ right.double().T
    cut_off = implementations()[OP][device.type] == "triton"  # its sums stay in the tensor cores
    assert (weight.double() - exact).norm() <= (1e-4 if cut_off else 3e-6) * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(63, 1000), (130, 5000)])
def test_a_total_goes_on_unrounded(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, device=device).to(dtype)
    total, exact = weight.float(), weight.double()
    for _ in range(20):
        left, right = (factor * 0.03 for factor in factors(*shape, 1, device))
        exact += left.double() @ right.double().T
        add_low_rank_(weight, left, right, total)
    assert_rounded_once(weight, exact)
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-5)
    assert weight.equal(total.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_memory_layout_of_the_factors_gives_the_same_bits(device: torch.device, dtype: torch.dtype) -> None:
    start = torch.randn(300, 170, device=device).to(dtype)
    left, right = factors(300, 170, 7, device)
    results = []
    for lay_out in (lambda x: x, lambda x: x.T.contiguous().T, lambda x: x.repeat_interleave(2, 0)[::2]):
        weight = start.clone()
        add_low_rank_(weight, lay_out(left), lay_out(right))
        results.append(weight)
    assert results[0].equal(results[1]) and results[0].equal(results[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_stored_transposed_is_written_in_place(device: torch.device, dtype: torch.dtype) -> None:
    stored = torch.randn(170, 2 * 300, device=device).to(dtype)
    weight, rest = stored[:, ::2].T, stored[:, 1::2].clone()
    left, right = factors(300, 170, 7, device)
    exact = weight.double() + left.double() @ right.double().T
    add_low_rank_(weight, left, right)
    assert_rounded_once(stored[:, ::2].T, exact)
    assert stored[:, 1::2].equal(rest)


def test_factors_of_any_precision_are_taken_in_that_of_the_sum(device: torch.device) -> None:
    left, right = factors(40, 30, 3, device)
    for dtype in (torch.float64, torch.bfloat16):
        weight = torch.zeros(40, 30, device=device)
        add_low_rank_(weight, left.to(dtype), right.to(dtype))
        torch.testing.assert_close(weight, left.to(dtype).float() @ right.to(dtype).float().T)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_spreads_along_its_row(device: torch.device, dtype: torch.dtype, broken: float) -> None:
    weight = torch.randn(200, 100, device=device).to(dtype)
    left, right = factors(200, 100, 4, device)
    left[150, 2] = broken
    add_low_rank_(weight, left, right)
    finite = weight.isfinite()
    assert not finite[150].any()
    assert finite.sum() == 199 * 100


@pytest.mark.parametrize(
    ("weight", "left", "right", "total", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(3, 2), torch.zeros(4, 2), None, r"got \[4, 3\], \[3, 2\], \[4, 2\]"),
        (torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(3, 1), None, r"left \[d_out, B\], right \[d_in, B\]"),
        (torch.zeros(4, 3), torch.zeros(4), torch.zeros(3), None, r"got \[4, 3\], \[4\], \[3\]"),
        (torch.zeros(4, 3).half(), torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(3, 4), r"\[3, 4\]"),
        (torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(4, 3), "total is float32 for a float16"),
        (torch.zeros(4, 3).half(), torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(4, 3).double(), "got.*float64"),
        (torch.zeros(4, 3).long(), torch.zeros(4, 2), torch.zeros(3, 2), None, "int64"),
        (torch.zeros(4, 3), torch.zeros(4, 2, device="meta"), torch.zeros(3, 2), None, "one device"),
    ],
)
def test_what_does_not_fit_is_refused(
    weight: Tensor, left: Tensor, right: Tensor, total: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        add_low_rank_(weight, left, right, total)


@pytest.mark.parametrize(("dtype", "with_total"), [(torch.float32, False), (torch.float16, False), (torch.half, True)])
def test_opcheck(device: torch.device, dtype: torch.dtype, with_total: bool) -> None:
    weight = torch.randn(9, 7, device=device).to(dtype)
    total = weight.float() if with_total else None
    opcheck(torch.ops.lightedit.add_low_rank_.default, (weight, *factors(9, 7, 2, device), total))
