"""A short name for a model's weights, the same on every machine, in float32 and in bfloat16."""

import hashlib

import torch
from transformers import PreTrainedModel

_SAMPLES = 64  # elements read of each parameter: enough to tell two models apart, cheap for a large one


def fingerprint(model: PreTrainedModel) -> str:
    """Hash the architecture and evenly spaced elements of every parameter, rounded to bfloat16.

    A covariance or an edit belongs to one model's weights; this tells them apart without reading all of them.
    Parameters that are not in memory (offloaded) count by name and shape. Weights that were rounded to float16 on
    loading may hash differently.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":
            flat = parameter.detach().reshape(-1)
            count = min(_SAMPLES, flat.numel())
            # in integers, because a float's rounding could move an index on another machine
            index = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(1, count - 1)
            sample = flat[index].to(torch.bfloat16)
            digest.update(sample.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
