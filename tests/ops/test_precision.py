"""The ops' own products in float32 beside a model's that round to less."""

from collections.abc import Iterator

import pytest
import torch

from lightedit.ops import add_low_rank_, preservation_memorization_solve, rowwise_low_rank, second_moment_, use
from lightedit.ops._precision import whole_float32

DEVICES = {"cpu": torch.backends.mkldnn.matmul, "cuda": torch.backends.cuda.matmul}
ROUNDED = {"cpu": "bf16", "cuda": "tf32"}


@pytest.fixture(params=["legacy", "new"])
def rounding(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process that was told to round in products, in either of torch's ways."""
    if request.param == "legacy":
        torch.set_float32_matmul_precision("medium")
    else:
        for device, products in DEVICES.items():
            products.fp32_precision = ROUNDED[device]
    yield
    torch.set_float32_matmul_precision("highest")
    for products in DEVICES.values():
        products.fp32_precision = "none"


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("device", DEVICES)
def test_rounding_is_off_within_the_context_and_on_again_after_it(device: str) -> None:
    products, expected = DEVICES[device], ROUNDED[device]
    other = next(name for name in DEVICES if name != device)
    with whole_float32(torch.device(device)):
        assert products.fp32_precision == "ieee"
        assert DEVICES[other].fp32_precision == ROUNDED[other]
        with whole_float32(torch.device(device)):
            assert products.fp32_precision == "ieee"
        assert products.fp32_precision == "ieee"
    assert products.fp32_precision == expected
    with pytest.raises(KeyError), whole_float32(torch.device(device)):
        raise KeyError
    assert products.fp32_precision == expected


@pytest.mark.parametrize("device", DEVICES)
def test_the_default_is_left_as_it_is(device: str) -> None:
    with whole_float32(torch.device(device)):
        assert DEVICES[device].fp32_precision == "none"
    assert DEVICES[device].fp32_precision == "none"


def test_other_devices_have_nothing_to_switch() -> None:
    with whole_float32(torch.device("meta")):
        pass


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("implementation", ["reference", "triton", "native"])
def test_results_do_not_follow_the_switch(implementation: str, device: str) -> None:
    keys = torch.randn(1000, 600, device=device)
    if (keys.T @ keys - (keys.double().T @ keys.double())).abs().max() < 1e-2:
        pytest.skip(f"this machine's {device} does not round in float32 products")
    gram, exact = torch.zeros(600, 600, device=device), (keys.double().T @ keys.double()).tril()
    weight, left, right = torch.zeros(300, 600, device=device), keys[:300, :40], keys[:600, 40:80]
    inputs = keys[None].clone().requires_grad_()
    systems = torch.randn(2, 600, 140, device=device)
    try:
        with use(implementation):  # type: ignore[arg-type]
            second_moment_(gram, keys)
            add_low_rank_(weight, left, right)
            outputs = rowwise_low_rank(inputs, left[None], right[None])
            (gradient,) = torch.autograd.grad(outputs.sum(), inputs)
            solutions = {size: preservation_memorization_solve(systems[..., :size], systems[..., :size], 1.0)[0]
                         for size in (40, 140)}  # fmt: skip
    except RuntimeError as error:
        pytest.skip(str(error))
    assert (gram - exact).norm() <= 2e-5 * exact.norm()
    sums = left.double() @ right.double().T
    assert (weight - sums).norm() <= 1e-5 * sums.norm()
    rows = keys.double() @ right.double() @ left.double().T
    assert (outputs[0] - rows).norm() <= 2e-5 * rows.norm()
    slopes = (left.double().sum(0) @ right.double().T).expand(1000, -1)
    assert (gradient[0] - slopes).norm() <= 2e-5 * slopes.norm()
    for size, solution in solutions.items():
        x = systems[..., :size].double()
        expected = torch.linalg.solve(x.mT @ x + torch.eye(size, device=device), x, left=False)
        assert (solution - expected).norm() <= 2e-5 * expected.norm()
