"""The lower triangle of keysᵀ keys, against the whole product in float64."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from lightedit.ops import mirror_, second_moment_

OP = "second_moment_"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [1, 63, 128, 300, 1000]


def poisoned(d: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zero on and below the diagonal, NaN above it."""
    return torch.full((d, d), torch.nan, dtype=dtype, device=device).triu(1)


def assert_is_sum(gram: Tensor, keys: Tensor, times: int = 1) -> None:
    """`gram` is `times` keysᵀ keys below the diagonal, to the rounding of its sums, and NaN above."""
    keys = keys.double()
    exact, size = times * (keys.T @ keys), times * (keys.abs().T @ keys.abs())
    difference = (gram.double() - exact).abs()
    slack = 2e-6 if gram.device.type == "cpu" else 1e-5  # tensor cores cut off where a processor rounds
    assert (difference <= slack * size).tril().logical_or(torch.ones_like(gram).triu(1).bool()).all()
    assert gram.isnan().equal(torch.ones_like(gram).triu(1).bool())


@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("n", [0, 1, 63, 1000])
def test_equals_the_product(device: torch.device, n: int, d: int, dtype: torch.dtype, gram_dtype: torch.dtype) -> None:
    keys = torch.randn(n, d, device=device).to(dtype)
    gram = poisoned(d, device, gram_dtype)
    second_moment_(gram, keys)
    assert_is_sum(gram, keys)
    second_moment_(gram, keys)
    assert_is_sum(gram, keys, times=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("d", [63, 300])
def test_masked_keys_are_never_read_as_numbers(device: torch.device, d: int, share: float, dtype: torch.dtype) -> None:
    mask = torch.rand(1000, device=device) < share
    keys = torch.randn(1000, d, device=device).to(dtype)
    keys[~mask] = torch.nan
    gram = poisoned(d, device)
    second_moment_(gram, keys, mask)
    assert_is_sum(gram, keys[mask])


def test_more_keys_than_are_packed_at_one_time(device: torch.device) -> None:
    keys = torch.randn(4096 + 513, 70, device=device)
    for dtype in DTYPES:
        for mask in (None, torch.rand(len(keys), device=device) < 0.95):
            gram = poisoned(70, device)
            second_moment_(gram, keys.to(dtype), mask)
            assert_is_sum(gram, (keys if mask is None else keys[mask]).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_memory_layout_will_do(device: torch.device, dtype: torch.dtype) -> None:
    wide = torch.randn(200, 2 * 130, device=device).to(dtype)
    mask = (torch.rand(400, device=device) < 0.5)[::2]
    for keys in (wide[:, ::2], wide[:, 1:131], wide[:, :130].T.contiguous().T, wide[:1, :130].expand(200, 130)):
        gram = poisoned(260, device)[::2, ::2]  # a view with steps of its own
        transposed = poisoned(130, device).T.contiguous().T
        for target in (gram, transposed):
            second_moment_(target, keys, mask)
            assert_is_sum(target, keys[mask])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_rounded_keys_are_not_rounded(device: torch.device, dtype: torch.dtype) -> None:
    """512 times 1 or a bit more, in float32 exact in any order: in the keys' own precision digits would be lost."""
    keys = torch.ones(512, 2, device=device, dtype=dtype)
    keys[:, 1] = 1 + 2**-7  # squared, it has more digits than either type holds
    gram = torch.zeros(2, 2, device=device)
    second_moment_(gram, keys)
    exact = 512 * torch.tensor([[1, 0], [1 + 2**-7, (1 + 2**-7) ** 2]], device=device)
    slack = 0.0 if device.type == "cpu" else 1e-5  # tensor cores cut off where a processor rounds
    torch.testing.assert_close(gram, exact, rtol=slack, atol=0.0)


def test_a_float64_gram_collects_without_loss(device: torch.device) -> None:
    gram = torch.full((1, 1), 2.0**40, dtype=torch.float64, device=device)
    for _ in range(3):
        second_moment_(gram, torch.ones(1, 1, device=device))
    assert gram.item() == 2.0**40 + 3


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_spreads_to_its_row_and_column_only(
    device: torch.device, dtype: torch.dtype, broken: float
) -> None:
    keys = torch.randn(40, 300, device=device).to(dtype)
    keys[7, 150] = broken
    gram = torch.zeros(300, 300, device=device)
    second_moment_(gram, keys)
    finite = mirror_(gram).isfinite()
    assert not finite[150].any()
    assert not finite[:, 150].any()
    assert finite.sum() == 299**2


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_keys_give_the_same_bits(device: torch.device, dtype: torch.dtype) -> None:
    keys, mask = torch.randn(1000, 300, device=device).to(dtype), torch.rand(1000, device=device) < 0.7
    grams = [torch.zeros(300, 300, device=device) for _ in range(3)]
    for gram in grams:
        second_moment_(gram, keys, mask)
    assert grams[0].equal(grams[1]) and grams[0].equal(grams[2])


@pytest.mark.parametrize("d", [0, 1, 63, 1024, 1500])
def test_mirror_completes_the_matrix(d: int) -> None:
    full = torch.randn(d, d)
    full = full + full.T
    assert mirror_(full.tril() + torch.full((d, d), torch.nan).triu(1)).equal(full)
    with pytest.raises(ValueError, match=r"square matrix.*\[2, 3\]"):
        mirror_(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("gram", "keys", "mask", "message"),
    [
        (torch.zeros(3, 3), torch.zeros(5, 4), None, r"gram \[d, d\] and keys \[n, d\], got \[3, 3\] and \[5, 4\]"),
        (torch.zeros(3, 4), torch.zeros(5, 4), None, r"got \[3, 4\]"),
        (torch.zeros(4, 4), torch.zeros(2, 5, 4), None, r"got \[4, 4\] and \[2, 5, 4\]"),
        (torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(5, 4), None, "gram is float32 or float64.*bfloat16"),
        (torch.zeros(4, 4), torch.zeros(5, 4, dtype=torch.long), None, "int64"),
        (torch.zeros(4, 4), torch.zeros(5, 4), torch.ones(4).bool(), r"mask is \[5\] bool.*\[4\]"),
        (torch.zeros(4, 4), torch.zeros(5, 4), torch.ones(5), r"mask is \[5\] bool.*float32"),
        (torch.zeros(4, 4), torch.zeros(5, 4, device="meta"), None, "one device, got cpu, meta"),
    ],
)
def test_what_does_not_fit_is_refused(gram: Tensor, keys: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        second_moment_(gram, keys, mask)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(device: torch.device, masked: bool) -> None:
    mask = torch.rand(9, device=device) < 0.5 if masked else None
    gram, keys = torch.zeros(7, 7, device=device), torch.randn(9, 7, device=device)
    opcheck(torch.ops.lightedit.second_moment_.default, (gram, keys, mask))
