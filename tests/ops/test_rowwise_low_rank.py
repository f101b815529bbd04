"""Each row's own low-rank product and its gradient, against plain autograd in float64."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from lightedit.ops import rowwise_low_rank

OP = "rowwise_low_rank"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8 * 1.01, torch.float16: 2**-11 * 1.01}
DTYPES = list(TOLERANCE)
SHAPES = [  # b, t, d_in, d_out, r
    (1, 1, 1, 1, 1),
    (3, 7, 63, 100, 1),
    (2, 5, 1000, 63, 33),
    (4, 1, 130, 1000, 3),
    (0, 5, 8, 9, 2),
    (2, 0, 8, 9, 2),
    (2, 3, 8, 9, 0),
]


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    b, t, d_in, d_out, r = shape
    sizes = [(b, t, d_in), (b, d_out, r), (b, d_in, r)]
    x, left, right = (torch.randn(size, device=device).to(dtype) for size in sizes)
    return x, left, right


def plain(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("bti,bir,bor->bto", x, right, left)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.double(), expected, rtol=TOLERANCE[actual.dtype], atol=1e-5 * scale * (actual.dtype != torch.float64)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_equal_plain_autograd(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    given = [tensor.requires_grad_() for tensor in problem(shape, dtype, device)]
    exact_given = [tensor.detach().double().requires_grad_() for tensor in given]
    y, exact = rowwise_low_rank(*given), plain(*exact_given)
    assert y.dtype == dtype and y.is_contiguous()
    assert_close(y.detach(), exact.detach())
    gradient = torch.randn_like(y)
    y.backward(gradient)
    exact.backward(gradient.double())
    for tensor, exact_tensor in zip(given, exact_given, strict=True):
        assert tensor.grad is not None and exact_tensor.grad is not None and tensor.grad.dtype == dtype
        assert_close(tensor.grad, exact_tensor.grad)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_each_gradient_is_that_of_finite_differences(device: torch.device, wanted: tuple[bool, ...]) -> None:
    tensors = problem((2, 3, 4, 5, 2), torch.float64, device)
    given = [tensor.requires_grad_(wants) for tensor, wants in zip(tensors, wanted, strict=True)]
    if not any(wanted):
        assert not rowwise_low_rank(*given).requires_grad
        return
    assert torch.autograd.gradcheck(rowwise_low_rank, given)
    assert torch.autograd.gradgradcheck(rowwise_low_rank, given)
    torch.autograd.backward(rowwise_low_rank(*given).sum())
    assert [tensor.grad is not None for tensor in given] == list(wanted)


def test_the_input_is_kept_for_the_gradients_of_factors_alone(device: torch.device) -> None:
    x, left, right = problem((2, 3, 4, 5, 2), torch.float32, device)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    for trained in (False, True):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            rowwise_low_rank(x.requires_grad_(), left.requires_grad_(trained), right)
        assert (x.data_ptr() in kept) == trained


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_sees_its_own_change_only(device: torch.device, dtype: torch.dtype) -> None:
    x, left, right = problem((3, 4, 20, 30, 2), dtype, device)
    left[1], right[2] = torch.nan, torch.inf
    y = rowwise_low_rank(x, left, right)
    assert_close(y[:1], plain(x[:1].double(), left[:1].double(), right[:1].double()))
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_memory_layout_will_do(device: torch.device, dtype: torch.dtype) -> None:
    x, left, right = problem((3, 4, 20, 30, 2), dtype, device)
    expected = plain(x.double(), left.double(), right.double())
    lay_out = [lambda a: a.mT.contiguous().mT, lambda a: a.repeat_interleave(2, 0)[::2]]
    for change in lay_out:
        assert_close(rowwise_low_rank(change(x), change(left), change(right)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_lies_between_the_factors_is_not_rounded(device: torch.device, dtype: torch.dtype) -> None:
    """1 + 2⁻¹² has more digits than either type holds; subtracting 1 again shows whether it was kept."""
    x = torch.tensor([[[1.0, 2.0**-12]]], dtype=dtype, device=device)
    right = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]], dtype=dtype, device=device)
    left = torch.tensor([[[1.0, -1.0]]], dtype=dtype, device=device)
    assert rowwise_low_rank(x, left, right).item() == 2.0**-12


def test_factors_in_float32_serve_a_bfloat16_model(device: torch.device) -> None:
    x, left, right = problem((3, 4, 20, 30, 2), torch.float32, device)
    y = rowwise_low_rank(x.bfloat16(), left, right)
    assert y.dtype == torch.bfloat16
    assert_close(y, plain(x.bfloat16().double(), left.double(), right.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_input_gives_the_same_bits(device: torch.device, dtype: torch.dtype) -> None:
    x, left, right = problem((3, 40, 200, 300, 5), dtype, device)
    assert rowwise_low_rank(x, left, right).equal(rowwise_low_rank(x, left, right))


@pytest.mark.parametrize(
    ("x", "left", "right", "message"),
    [
        ((2, 3, 4), (2, 5, 1), (3, 4, 1), r"got \[2, 3, 4\], \[2, 5, 1\], \[3, 4, 1\]"),
        ((2, 3, 4), (2, 5, 1), (2, 4, 2), r"left \[b, d_out, r\]"),
        ((2, 3, 4), (2, 4, 1), (2, 5, 1), r"right \[b, d_in, r\]"),
        ((3, 4), (5, 1), (4, 1), r"x \[b, t, d_in\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    x: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rowwise_low_rank(torch.zeros(x), torch.zeros(left), torch.zeros(right))


def test_other_dtypes_and_devices_are_refused() -> None:
    x, left, right = torch.zeros(2, 3, 4), torch.zeros(2, 5, 1), torch.zeros(2, 4, 1)
    with pytest.raises(ValueError, match="int64"):
        rowwise_low_rank(x.long(), left, right)
    with pytest.raises(ValueError, match="one device"):
        rowwise_low_rank(x, left.to("meta"), right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device: torch.device, dtype: torch.dtype) -> None:
    given = problem((3, 4, 20, 30, 2), dtype, device)
    # as float32, since in bfloat16 it compares two roundings of one gradient
    trained = [tensor.requires_grad_(dtype == torch.float32) for tensor in given]
    opcheck(torch.ops.lightedit.rowwise_low_rank.default, tuple(trained))
