"""The fingerprint of a model's weights. It is the same on every machine, in float32 and in bfloat16."""

import hashlib

import torch
from transformers import PreTrainedModel

_SAMPLES = 64  # elements read of each parameter: they tell two models apart, and reading them is cheap


def fingerprint(model: PreTrainedModel) -> str:
    """Hash the architecture and evenly spaced elements of every parameter, rounded to bfloat16.

    The fingerprint ties a covariance or an edit to one model. Offloaded parameters count by name and shape alone.
    Weights that were rounded to float16 on loading may hash differently.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":
            flat = parameter.detach().reshape(-1)
            count = min(_SAMPLES, flat.numel())
            # integer arithmetic: rounding in floating point could move an index on another machine
            index = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(1, count - 1)
            sample = flat[index].to(torch.bfloat16)
            digest.update(sample.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
