"""The fingerprint of a model's weights. It is the same on every machine, in float32 and in bfloat16."""

import hashlib

import torch
from transformers import PreTrainedModel

_SAMPLES = 64  # elements read of each parameter: they tell two models apart, and reading them is cheap


def differing_dtypes(made: str, dtype: torch.dtype) -> str:
    """The end of a message about two fingerprints: which dtypes may be why they differ; empty if none may.

    Args:
        made: dtype of the model for which something was made, such as "float32".
        dtype: dtype of the model at hand.
    """
    here = str(dtype).removeprefix("torch.")
    if made == here or "float16" not in (made, here):
        return ""
    return f". It was {made} and is {here}: float16 rounds weights, so load it in {made}"


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
