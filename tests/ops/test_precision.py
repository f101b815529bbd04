"""The ops' own products in float32 beside a model's in TF32."""

from collections.abc import Iterator

import pytest
import torch

from lightedit.ops import add_low_rank_, preservation_memorization_solve, rowwise_low_rank, second_moment_, use
from lightedit.ops._precision import whole_float32

GPU = torch.device("cuda")


@pytest.fixture(params=["legacy", "new"])
def tf32(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process that was told to multiply in TF32, in either of torch's ways."""
    if request.param == "legacy":
        torch.set_float32_matmul_precision("high")
    else:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"


def precision() -> str:
    return torch.backends.cuda.matmul.fp32_precision


@pytest.mark.usefixtures("tf32")
def test_tf32_is_off_within_the_context_and_on_again_after_it() -> None:
    with whole_float32(GPU):
        assert precision() == "ieee"
        with whole_float32(GPU):
            assert precision() == "ieee"
        assert precision() == "ieee"
    assert precision() == "tf32"
    with pytest.raises(KeyError), whole_float32(GPU):
        raise KeyError
    assert precision() == "tf32"


@pytest.mark.usefixtures("tf32")
def test_the_cpu_changes_nothing() -> None:
    with whole_float32(torch.device("cpu")):
        assert precision() == "tf32"


def test_the_default_is_left_as_it_is() -> None:
    with whole_float32(GPU):
        assert precision() == "none"
    assert precision() == "none"


@pytest.mark.cuda
@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("implementation", ["reference", "triton", "native"])
def test_results_do_not_follow_the_switch(implementation: str) -> None:
    keys = torch.randn(1000, 600, device=GPU)
    gram, exact = torch.zeros(600, 600, device=GPU), (keys.double().T @ keys.double()).tril()
    weight, left, right = torch.zeros(300, 600, device=GPU), keys[:300, :40], keys[:600, 40:80]
    systems = torch.randn(2, 600, 140, device=GPU)
    try:
        with use(implementation):  # type: ignore[arg-type]
            second_moment_(gram, keys)
            add_low_rank_(weight, left, right)
            outputs = rowwise_low_rank(keys[None], left[None], right[None])
            solutions = {size: preservation_memorization_solve(systems[..., :size], systems[..., :size], 1.0)[0]
                         for size in (40, 140)}  # fmt: skip
    except RuntimeError as error:
        pytest.skip(str(error))
    assert (gram - exact).norm() <= 2e-5 * exact.norm()
    sums = left.double() @ right.double().T
    assert (weight - sums).norm() <= 1e-5 * sums.norm()
    rows = keys.double() @ right.double() @ left.double().T
    assert (outputs[0] - rows).norm() <= 2e-5 * rows.norm()
    for size, solution in solutions.items():
        x = systems[..., :size].double()
        expected = torch.linalg.solve(x.mT @ x + torch.eye(size, device=GPU), x, left=False)
        assert (solution - expected).norm() <= 2e-5 * expected.norm()
