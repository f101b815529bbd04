"""The Triton kernels against the references: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightedit.ops import _triton
from lightedit.ops.implementations import REFERENCES

if torch.cuda.is_available():
    DEVICE = "cuda"
else:
    DEVICE = "cpu"
    pytest.importorskip("triton", reason="Triton is not installed")


def kernel(name: str) -> Any:
    return pytest.importorskip(f"lightedit.ops._triton.{name}", reason="Triton is not installed", exc_type=ImportError)


interpreter = pytest.importorskip("triton.runtime.interpreter")
tl = pytest.importorskip("triton.language")
triton_second_moment = kernel("second_moment")
triton_add_low_rank = kernel("add_low_rank")
triton_rowwise_low_rank = kernel("rowwise_low_rank")
triton_target_nll_kl = kernel("target_nll_kl")
triton_solve = kernel("solve")


def widened(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(autouse=True)
def _right_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it comes, the interpreter multiplies bits of bfloat16 numbers as integers, and cuts off where a GPU rounds."""
    if DEVICE != "cpu":
        return
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return widened(np.asarray(data)).view(np.uint32)
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.array(data, dtype=np.float32)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            interpreter.TensorHandle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return dot(self, a, b, *rest)

    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


HALF, SINGLE = (torch.float16, torch.bfloat16), torch.float32
DTYPES = (*HALF, SINGLE)
SUMS = {torch.float16: 2e-3, torch.bfloat16: 8e-3, torch.float32: 5e-6}  # of results in the inputs' dtype
SUM = 2e-6 if DEVICE == "cpu" else 2e-5  # of long sums in float32, which tensor cores cut off where a processor rounds


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """In this mode what `torch.empty` gives is NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, dtype: torch.dtype = SINGLE, transposed: bool = False) -> Tensor:
    values = torch.randn(*shape, dtype=torch.float64).to(dtype)
    if transposed:  # the same values in another memory layout
        values = values.mT.contiguous().mT
    return values.to(DEVICE)


def off(actual: Tensor, expected: Tensor) -> float:
    """Relative error; NaN is no number."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


TILES = triton_second_moment.Tiles(rows=64, columns=32, depth=64, segment=512, warps=4, stages=2)


def moment(gram: Tensor, keys: Tensor, mask: Tensor | None = None) -> None:
    triton_second_moment.run(gram, keys, mask, tiles=TILES, side=64)


class TestSecondMoment:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("n", "d"), [(1, 5), (63, 130), (1000, 77)])
    @pytest.mark.parametrize("collected", [torch.float32, torch.float64])
    def test_equals_reference(self, n: int, d: int, dtype: torch.dtype, collected: torch.dtype) -> None:
        keys, mask = randn(n, d, dtype=dtype), (torch.rand(n) < 0.7).to(DEVICE)
        before = randn(d, d, dtype=collected)
        for chosen in (None, mask):
            actual, expected = before.clone(), before.clone()
            moment(actual, keys, chosen)
            REFERENCES["second_moment_"](expected, keys, chosen)
            assert off(actual, expected) < SUM
            assert actual.triu(1).equal(before.triu(1))

    def test_own_tiles(self) -> None:
        """Those of a real run, whose squares are many tiles wide."""
        keys = randn(70, 300, dtype=torch.bfloat16)
        for tiles in (triton_second_moment._HALF, triton_second_moment._SMALL):
            actual, expected = torch.zeros(2, 300, 300, device=DEVICE)
            triton_second_moment.run(actual, keys, None, tiles, side=256)
            REFERENCES["second_moment_"](expected, keys, None)
            assert off(actual, expected) < SUM

    def test_masked_keys_are_not_read_as_numbers(self) -> None:
        keys, mask = randn(9, 20), torch.arange(9, device=DEVICE) % 2 == 0
        keys[~mask] = torch.nan
        actual, expected = torch.zeros(2, 20, 20, device=DEVICE)
        moment(actual, keys, mask)
        REFERENCES["second_moment_"](expected, keys, mask)
        assert off(actual, expected) < SUM
        moment(actual, keys, torch.zeros(9, dtype=torch.bool, device=DEVICE))
        assert off(actual, expected) < SUM

    def test_nan_and_infinity_spread_to_their_row_and_column(self) -> None:
        for bad in (torch.nan, torch.inf):
            keys, actual, expected = randn(70, 20).abs() + 1, *torch.zeros(2, 20, 20, device=DEVICE)
            keys[66, 7] = bad
            moment(actual, keys)
            REFERENCES["second_moment_"](expected, keys, None)
            assert actual.isnan().equal(expected.isnan())
            assert actual.isfinite().equal(expected.isfinite())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_layouts_do_not_matter(self, dtype: torch.dtype) -> None:
        keys = randn(63, 40, dtype=dtype)
        one, other = torch.zeros(40, 40, device=DEVICE), torch.zeros(40, 80, device=DEVICE)[:, ::2].T
        moment(one, keys)
        moment(other, keys.T.contiguous().T)
        assert off(other, one) < 1e-6
        strided = randn(126, 80, dtype=dtype)
        strided[::2, ::2] = keys
        again = torch.zeros(40, 40, device=DEVICE)
        moment(again, strided[::2, ::2], torch.ones(126, dtype=torch.bool, device=DEVICE)[::2])
        assert off(again, one) < 1e-6

    def test_twice_the_same_bits(self) -> None:
        keys, (one, other) = randn(600, 33), torch.zeros(2, 33, 33, device=DEVICE)
        moment(one, keys)
        moment(other, keys)
        assert one.equal(other)

    @pytest.mark.parametrize(("n", "d"), [(0, 4), (4, 0)])
    def test_nothing_to_add(self, n: int, d: int) -> None:
        gram = randn(d, d)
        moment(gram, kept := randn(n, d), torch.ones(n, dtype=torch.bool, device=DEVICE))
        assert gram.isfinite().all() and len(kept) == n

    def test_float64_is_as_exact_as_the_reference(self) -> None:
        keys, (actual, expected) = randn(30, 10, dtype=torch.float64), torch.zeros(2, 10, 10, device=DEVICE).double()
        moment(actual, keys)
        REFERENCES["second_moment_"](expected, keys, None)
        assert actual.equal(expected)


class TestAddLowRank:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("d_out", "d_in", "rank"), [(70, 130, 1), (33, 50, 40), (3, 5, 0)])
    def test_one_rounding(self, d_out: int, d_in: int, rank: int, dtype: torch.dtype) -> None:
        weight, left, right = randn(d_out, d_in, dtype=dtype), randn(d_out, rank), randn(d_in, rank)
        exact = weight.double() + left.double() @ right.double().T
        actual = weight.clone()
        triton_add_low_rank.run(actual, left, right, None)
        assert (actual == exact.float().to(dtype)).double().mean() > (0.99 if dtype in HALF else -1)
        assert off(actual, exact.to(dtype)) < SUMS[dtype] / 4

    @pytest.mark.parametrize("dtype", HALF)
    def test_total_goes_on_unrounded(self, dtype: torch.dtype) -> None:
        weight = randn(20, 30, dtype=dtype)
        total, expected = weight.float(), weight.double()
        for _ in range(3):
            left, right = 1e-3 * randn(20, 2), randn(30, 2)
            triton_add_low_rank.run(weight, left, right, total)
            expected += left.double() @ right.double().T
        assert off(total, expected) < 1e-6
        assert weight.equal(total.to(dtype))

    def test_layouts_and_dtypes_of_factors(self) -> None:
        weight, total = randn(20, 30, dtype=torch.bfloat16, transposed=True), randn(30, 20).T
        left, right = randn(20, 5, dtype=torch.float64, transposed=True), randn(30, 5, dtype=torch.float16)
        expected_weight, expected_total = weight.clone(), total.clone()
        triton_add_low_rank.run(weight, left, right, total)
        REFERENCES["add_low_rank_"](expected_weight, left, right, expected_total)
        assert off(total, expected_total) < 1e-6
        assert weight.equal(total.to(weight.dtype))

    def test_nan_and_infinity_spread_as_in_a_product(self) -> None:
        left, right = randn(40, 3).abs() + 1, randn(50, 3).abs() + 1
        left[3, 1], right[7, 2] = torch.nan, torch.inf
        actual, expected = torch.zeros(2, 40, 50, device=DEVICE)
        triton_add_low_rank.run(actual, left, right, None)
        REFERENCES["add_low_rank_"](expected, left, right, None)
        assert actual.isnan().equal(expected.isnan())
        assert actual.isfinite().equal(expected.isfinite())


class TestRowwiseLowRank:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("b", "t", "d_in", "d_out", "rank"), [(3, 1, 63, 70, 1), (2, 70, 33, 5, 20), (2, 3, 4, 5, 0), (0, 3, 4, 5, 1)]
    )
    def test_equals_reference(self, b: int, t: int, d_in: int, d_out: int, rank: int, dtype: torch.dtype) -> None:
        x = randn(b, t, d_in, dtype=dtype)
        left, right = randn(b, d_out, rank), randn(b, d_in, rank, dtype=dtype, transposed=True)
        actual, expected = triton_rowwise_low_rank.run(x, left, right), REFERENCES["rowwise_low_rank"](x, left, right)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=SUMS[dtype], atol=1e-4)


def plain_head(dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor | None]:
    return randn(97, 16, dtype=dtype), randn(97, dtype=dtype) if bias else None


class TestTargetNllKl:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, 3.0)])
    @pytest.mark.parametrize(("m", "k"), [(1, 0), (0, 1), (5, 3)])
    def test_equals_reference(
        self, m: int, k: int, bias: bool, softcap: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(triton_target_nll_kl, "_BLOCK", 64)  # two blocks, the second one part full
        monkeypatch.setattr(triton_target_nll_kl, "_ROWS", 4)
        hidden, targets = randn(m + k, 16, dtype=dtype), torch.randint(97, (m,)).to(DEVICE)
        unedited = torch.randn(97, k).log_softmax(0).T.to(DEVICE)
        given = (hidden, *plain_head(dtype, bias), softcap, targets, unedited)
        loss, is_argmax, gradient = triton_target_nll_kl.run(*given)
        expected_loss, expected_leads, expected_gradient = REFERENCES["target_nll_kl"](*given)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
        assert is_argmax.equal(expected_leads)
        assert gradient.dtype == dtype
        assert off(gradient, expected_gradient) < SUMS[dtype]

    def test_nan_stays_at_its_position_and_large_logits_are_finite(self) -> None:
        hidden = torch.tensor([[3e4], [torch.nan], [-3e4]], device=DEVICE)
        weight = torch.tensor([[1.0], [-1.0], [0.5]], device=DEVICE)
        targets, none = torch.tensor([1, 0, 1], device=DEVICE), torch.empty(0, 3, device=DEVICE)
        loss, is_argmax, gradient = triton_target_nll_kl.run(hidden, weight, None, None, targets, none)
        assert loss[[0, 2]].tolist() == [6e4, 0.0] and loss[1].isnan()
        assert is_argmax.tolist() == [False, False, True]
        assert gradient[[0, 2]].isfinite().all() and gradient[1].isnan().all()

    def test_a_target_outside_the_vocabulary_gives_nan(self) -> None:
        weight, bias = plain_head(SINGLE, bias=True)
        targets = torch.tensor([0, 97, -1], device=DEVICE)
        loss, _, _ = triton_target_nll_kl.run(
            randn(3, 16), weight, bias, None, targets, torch.empty(0, 97, device=DEVICE)
        )
        assert loss.isnan().tolist() == [False, True, True]


def systems(*shape: int, dtype: torch.dtype = SINGLE) -> tuple[Tensor, Tensor]:
    """Keys, and what a well conditioned preservation term makes of them."""
    d = shape[-2]
    keys, scales = randn(*shape, dtype=torch.float64), 0.5 + torch.rand(d, 1, dtype=torch.float64).to(DEVICE)
    return keys.to(dtype), (keys / scales).to(dtype)


class TestSolve:
    @pytest.mark.parametrize(
        ("shape", "gamma"),
        [
            ((63, 1), 0.0),
            ((40, 10), 0.0),
            ((3, 2, 50, 5), 1.0),
            ((130, 100), 1.0),
            ((5, 17), 1.0),  # more facts than dimensions
            ((0, 7, 3), 1.0),
            ((7, 0), 1.0),
            ((140, 129), 1.0),
        ],
    )
    def test_equals_the_reference_in_float64(self, shape: tuple[int, ...], gamma: float) -> None:
        keys, solved = systems(*shape)
        right, pivots = triton_solve.run(keys, solved, gamma)
        exact, exact_pivots = REFERENCES["preservation_memorization_solve"](keys.double(), solved.double(), gamma)
        assert right.shape == exact.shape and pivots.shape == exact_pivots.shape
        assert off(right, exact) < 2e-5
        assert off(pivots, exact_pivots) < 2e-5

    def test_layouts_do_not_matter(self) -> None:
        keys, solved = systems(2, 40, 6)
        one, other = triton_solve.run(keys, solved, 1.0), triton_solve.run(keys.mT.contiguous().mT, solved, 1.0)
        assert off(other[0], one[0]) < 1e-6

    @pytest.mark.parametrize("bad", ["dependent", "nan", "infinity"])
    def test_a_system_without_solution_is_named_and_alone(self, bad: str) -> None:
        keys, solved = systems(3, 30, 4)
        if bad == "dependent":
            keys[1, :, 2], solved[1, :, 2] = 0.0, 0.0
        else:
            solved[1, 3, 2] = torch.nan if bad == "nan" else torch.inf
        right, pivots = triton_solve.run(keys, solved, 0.0)
        assert right[1].isnan().all() and (pivots[1] == 0).all()
        assert right[::2].isfinite().all() and (pivots[::2] > 0).all()


def test_every_op_has_a_kernel_and_reaches_it() -> None:
    assert _triton.FUNCTIONS.keys() == REFERENCES.keys()
    gram = torch.zeros(2, 2, device=DEVICE)
    _triton.FUNCTIONS["second_moment_"](gram, torch.tensor([[1.0, 2.0]], device=DEVICE), None)
    assert gram.tolist() == [[1.0, 0.0], [2.0, 4.0]]


def test_none_is_live_without_a_gpu_or_beside_one_that_is_too_old() -> None:
    assert _triton.kernels([]) == _triton.kernels([(7, 5)]) == _triton.kernels([(9, 0), (7, 0)]) == {}
    assert _triton.kernels([(8, 0), (12, 0)]).keys() == {(op, "cuda") for op in REFERENCES}
