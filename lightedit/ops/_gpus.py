"""Which compiled kernels the GPUs of this machine can run."""

import re
from collections.abc import Iterable

import torch

Capability = tuple[int, int]  # compute capability: major, minor

_CODE = re.compile(r"(sm|compute)_(\d+)(\d)([a-z]?)")


def capabilities() -> frozenset[Capability]:
    """The compute capabilities of the NVIDIA GPUs that torch sees; none where it sees no GPU.

    This starts CUDA in the process, so one that is forked from it cannot use the GPUs; a spawned one can.
    """
    if not (torch.version.cuda and torch.cuda.is_available()):
        return frozenset()
    return frozenset(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))


def fits(codes: Iterable[str], capability: Capability) -> bool:
    """Whether one of `codes`, named as nvcc names what it compiles for, runs on a GPU of `capability`.

    Machine code (`sm_80`) runs on its major version from its minor one on, and PTX (`compute_80`) on all that is later;
    either with a letter (`sm_90a`) on that very architecture.
    """
    for code in codes:
        if not (found := _CODE.fullmatch(code)):
            continue
        kind, letter, target = found[1], found[4], (int(found[2]), int(found[3]))
        same_major = capability[0] == target[0]
        if capability == target or (not letter and capability > target and (kind == "compute" or same_major)):
            return True
    return False
