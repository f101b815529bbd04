"""Every test of an op runs on each of its implementations, over memory that holds NaN until it is written."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from lightedit.ops import implementations, use

# (implementation, device); a test module names its op in OP
RUNS = [
    ("reference", "cpu"),
    ("native", "cpu"),
    *(pytest.param((name, "cuda"), marks=pytest.mark.cuda) for name in ("reference", "triton", "native")),
]


@pytest.fixture(params=RUNS, ids="-".join)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device to put tensors on; the module's op runs there on the implementation that is under test."""
    (name, device), op = request.param, request.module.OP
    with ExitStack() as stack:
        try:
            stack.enter_context(use(name))
        except RuntimeError as error:
            pytest.skip(str(error))
        if implementations()[op][device] != name:
            pytest.skip(f"{op} has no {name} implementation on {device}")
        yield torch.device(device)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """In this mode torch fills what is allocated and not yet written with NaN, and refuses ops that vary by run."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
