"""A short name for a model's weights, the same on every machine and in every floating-point dtype."""

import hashlib

import torch
from transformers import PreTrainedModel

_SAMPLES = 64  # elements read of each parameter: enough to tell two models apart, cheap for a large one


def fingerprint(model: PreTrainedModel) -> str:
    """Hash the architecture and evenly spaced elements of every parameter, rounded to bfloat16.

    A covariance or an edit belongs to one model's weights; this tells them apart without reading all of them.
    Parameters that are not in memory (offloaded) count by name and shape.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":
            flat = parameter.detach().reshape(-1)
            index = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64)
            sample = flat[index.long().to(flat.device)].to(torch.bfloat16)
            digest.update(sample.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
