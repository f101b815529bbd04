"""The B x B closed form against dense systems in float64."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from lightedit.ops import preservation_memorization_solve

OP = "preservation_memorization_solve"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
DTYPES = list(TOLERANCE)


def problem(
    *shape: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """A, K [..., d, B] and X = A⁻¹ K, for a well-conditioned A [d, d]."""
    keys = torch.randn(*shape, dtype=torch.float64, device=device)
    d = shape[-2]
    base = torch.randn(d, 2 * d, dtype=torch.float64, device=device)
    matrix = base @ base.T / (2 * d) + torch.eye(d, device=device)
    return matrix, keys.to(dtype), torch.linalg.solve(matrix, keys).to(dtype)


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert (actual.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("facts", [0, 1, 5, 32, 33, 63, 128, 129])
@pytest.mark.parametrize("lead", [(), (3,), (2, 0), (2, 3)])
def test_equals_the_system_of_its_definition(
    device: torch.device, lead: tuple[int, ...], facts: int, gamma: float, dtype: torch.dtype
) -> None:
    _, keys, solved = problem(*lead, 260, facts, dtype=dtype, device=device)
    right, pivots = preservation_memorization_solve(keys, solved, gamma)
    system = keys.double().mT @ solved.double() + gamma * torch.eye(facts, dtype=torch.float64, device=device)
    assert_relative(right, torch.linalg.solve(system, solved.double(), left=False), TOLERANCE[dtype])
    assert right.dtype == pivots.dtype == dtype
    assert pivots.shape == (*lead, facts)
    assert ((pivots > 0) & (pivots < 1 + 1e-5)).all()


@pytest.mark.parametrize("d", [1, 63, 1000])
def test_is_the_update_of_the_system_in_all_dimensions(device: torch.device, d: int) -> None:
    """right = (A + K Kᵀ)⁻¹ K at γ = 1, also for more keys than dimensions."""
    for facts in (1, 7, 100):
        matrix, keys, solved = problem(d, facts, device=device)
        right, _ = preservation_memorization_solve(keys, solved, 1.0)
        assert_relative(right, torch.linalg.solve(matrix + keys @ keys.T, keys), 1e-8)


@pytest.mark.parametrize("facts", [7, 40])
def test_past_keys_are_part_of_the_preservation_term(device: torch.device, facts: int) -> None:
    matrix, keys, _ = problem(100, facts, device=device)
    past = torch.randn(100, 30, dtype=torch.float64, device=device)
    with_past = matrix + past @ past.T
    right, _ = preservation_memorization_solve(keys, torch.linalg.solve(with_past, keys), 1.0)
    assert_relative(right, torch.linalg.solve(with_past + keys @ keys.T, keys), 1e-9)


def test_at_gamma_zero_every_key_gives_its_residual_exactly(device: torch.device) -> None:
    for facts in (1, 20, 50):
        _, keys, solved = problem(80, facts, device=device)
        right, _ = preservation_memorization_solve(keys, solved, 0.0)
        assert_relative(keys.T @ right, torch.eye(facts, dtype=torch.float64, device=device), 1e-9)


@pytest.mark.parametrize("facts", [3, 40])
def test_a_pivot_is_the_share_of_a_key_that_others_do_not_span(device: torch.device, facts: int) -> None:
    keys = torch.eye(60, facts, dtype=torch.float64, device=device)
    keys[:, 2] = 3 * keys[:, 0] + 4 * keys[:, 2]
    _, pivots = preservation_memorization_solve(keys, keys, 0.0)
    expected = torch.ones(facts, dtype=torch.float64, device=device)
    expected[2] = 16 / 25
    torch.testing.assert_close(pivots, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("facts", [4, 40, 129])
@pytest.mark.parametrize("broken", ["zero key", "nan", "inf", "negative"])
def test_a_system_without_a_solution_says_so_and_spoils_no_other(
    device: torch.device, broken: str, facts: int, dtype: torch.dtype
) -> None:
    _, keys, solved = problem(3, 50 + facts, facts, dtype=dtype, device=device)
    good, shares = preservation_memorization_solve(keys, solved, 0.0)
    if broken == "zero key":
        keys[1, :, 2] = solved[1, :, 2] = 0
    elif broken == "negative":
        solved[1] *= -1
    else:
        solved[1, 11, 2] = float(broken)
    right, pivots = preservation_memorization_solve(keys, solved, 0.0)
    assert right[1].isnan().all()
    assert (pivots[1] == 0).all()
    assert right[::2].equal(good[::2])
    assert pivots[::2].equal(shares[::2])


@pytest.mark.parametrize("facts", [4, 40])
def test_any_memory_layout_gives_the_same_solution(device: torch.device, facts: int) -> None:
    _, keys, solved = problem(2, 60, facts, device=device)
    expected, _ = preservation_memorization_solve(keys, solved, 1.0)
    column_major = [tensor.mT.contiguous().mT for tensor in (keys, solved)]
    spread = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in (keys, solved)]
    for layout in (column_major, spread):
        right, _ = preservation_memorization_solve(*layout, 1.0)
        torch.testing.assert_close(right, expected)
        assert right.is_contiguous()


@pytest.mark.parametrize("facts", [4, 40])
def test_the_same_problem_gives_the_same_bits(device: torch.device, facts: int) -> None:
    _, keys, solved = problem(5, 60, facts, device=device)
    first, second = (preservation_memorization_solve(keys, solved, 1.0) for _ in range(2))
    assert first[0].equal(second[0]) and first[1].equal(second[1])


@pytest.mark.parametrize(
    ("keys", "solved", "gamma", "message"),
    [
        (torch.zeros(5, 2), torch.zeros(5, 3), 1.0, r"both \[..., d, B\], got \[5, 2\] and \[5, 3\]"),
        (torch.zeros(5), torch.zeros(5), 1.0, r"got \[5\]"),
        (torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.float64), 1.0, "got torch.float32 and torch.float64"),
        (torch.zeros(5, 2).half(), torch.zeros(5, 2).half(), 1.0, "float16"),
        (torch.zeros(5, 2), torch.zeros(5, 2), -1.0, "gamma is finite and at least 0, got -1"),
        (torch.zeros(5, 2), torch.zeros(5, 2), float("nan"), "gamma.*nan"),
        (torch.zeros(5, 2), torch.zeros(5, 2, device="meta"), 1.0, "one device"),
    ],
)
def test_what_does_not_fit_is_refused(keys: Tensor, solved: Tensor, gamma: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preservation_memorization_solve(keys, solved, gamma)


@pytest.mark.parametrize("shape", [(50, 4), (50, 40), (3, 50, 4), (3, 50, 40), (140, 129)])
def test_opcheck(device: torch.device, shape: tuple[int, ...]) -> None:
    _, keys, solved = problem(*shape, device=device)
    opcheck(torch.ops.lightedit.preservation_memorization_solve.default, (keys, solved, 1.0))
