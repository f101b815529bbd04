"""Residuals in models with a norm between the MLP's output and the residual stream, such as Gemma 2, 3 and OLMo 2."""

import torch
from torch import Tensor

from lightedit.lm import Place
from lightedit.methods.closed_form.keys import KeyWalk

_DAMPING = 0.02  # of the median gain; entries whose gain is far below it mostly keep their present state
_BISECTIONS = 60


def before_norm(walk: KeyWalk, residuals: Tensor, size: Tensor | None = None) -> Tensor:
    """The change of the MLP's output that moves the residual stream by `residuals` [d, B], as far as that can be.

    Without a norm after the MLP it is the residual, divided by the constant with which the MLP's output enters the
    block's. An RMS norm is y = g u with u = m / rms(m). Entries with a gain near 0 cannot move y, and u has a root mean
    square of 1, so that not every y can be reached. The u nearest to the wanted one in y is found by damped least
    squares on that sphere, u = (g y + μ² u0) / (g² + μ² + ν), where ν sets the norm (Moré and Sorensen, 1983, doi
    10.1137/0904038).

    Args:
        walk: a walk at the MLP's matrix to write.
        residuals: what the residual stream lacks, [d, B].
        size: rms(m) afterwards, on which the norm's output does not depend, [B]; None keeps the present one.

    Returns:
        The change of the MLP's output, [d, B] float64.
    """
    residuals = residuals / walk.lm.anatomy.mlp_scale(walk.layer)
    norm = walk.lm.mlp_norm(walk.layer)
    if norm is None:
        return residuals
    outputs = walk.outputs(Place(walk.layer))
    gain = norm(outputs.new_ones(1, len(outputs), dtype=walk.lm.dtype)).double().T
    rms = outputs.square().mean(0).sqrt()
    present = outputs / rms
    damping = (_DAMPING * gain.abs().median()).square()
    weight = gain.square() + damping
    wanted = gain * (gain * present + residuals.to(outputs)) + damping * present
    return (rms if size is None else size) * _on_sphere(wanted, weight) - outputs


def _on_sphere(wanted: Tensor, weight: Tensor) -> Tensor:
    """wanted / (weight + ν) with the ν > -min(weight) at which columns have a root mean square of 1; [d, B].

    Args:
        wanted: [d, B] float64.
        weight: positive, [d, 1].
    """
    least, size = weight.min(), wanted.norm(dim=0) / len(wanted) ** 0.5
    low = torch.full_like(size, float(1e-12 * least)).log()  # of ν + min(weight)
    high = torch.maximum(size, least).log()  # every entry is divided by at least ν + min(weight)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        long = (wanted / (weight - least + middle.exp())).square().mean(0) > 1
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    return wanted / (weight - least + ((low + high) / 2).exp())


def behind_norm(walk: KeyWalk, layer: int, change: Tensor) -> Tensor:
    """The change of the residual stream that a change of the MLP's output [d, B] at `layer` causes, [d, B] float64."""
    norm, scale = walk.lm.mlp_norm(layer), walk.lm.anatomy.mlp_scale(layer)
    if norm is None:
        return scale * change
    present = walk.outputs(Place(layer))
    states = torch.stack([present + change.to(present), present]).mT
    after, before = norm(states.to(walk.lm.dtype)).mT.to(present)
    return scale * (after - before)


def remaining_delta(walk: KeyWalk, outputs: Tensor, left: Tensor) -> Tensor:
    """The change of the MLP's output that is still to be written at the value layer, [d, B] float64.

    Without earlier layers it is δ. Else it goes from the present output to the share of δ that they have left, in the
    direction in which the norm gives what the block still lacks.

    Args:
        walk: a walk at the MLP's matrix of the value layer.
        outputs: the MLP's outputs with δ, [d, B].
        left: the block's output with δ minus its present output, [d, B].
    """
    present = walk.outputs(walk.place)
    delta = outputs - present
    shift = behind_norm(walk, walk.layer, delta)
    if (shift - left).norm() <= 1e-6 * left.norm():
        return delta
    share = (left * shift).sum(0) / shift.square().sum(0).clamp(min=1e-30)
    return before_norm(walk, left, (present + share * delta).square().mean(0).sqrt())
