"""Residuals in models with a norm between the MLP's output and the residual stream, such as Gemma 2, 3 and OLMo 2."""

import torch
from torch import Tensor

from lightedit.lm import Place
from lightedit.methods.closed_form.keys import KeyWalk

_NORM_DAMPING = 0.02  # of the median gain; entries of a norm's gain far below it are not used to reach a residual


def before_norm(walk: KeyWalk, residuals: Tensor) -> Tensor:
    """Map residuals of the residual stream [d, B] to the MLP's output, through the norm that follows it, if any.

    An RMS norm is y = g u, where u = m / rms(m). The u that comes nearest to y + residual is found by damped least
    squares: entries with a gain near 0 cannot contribute, so they keep their present u. The result keeps rms(m), which
    the norm's output does not depend on.
    """
    residuals = residuals / walk.lm.anatomy.mlp_scale(walk.layer)
    norm = walk.lm.mlp_norm(walk.layer)
    if norm is None:
        return residuals
    outputs = walk.outputs(Place(walk.layer))
    residuals = residuals.to(outputs.device)  # the value layer may be on another device
    gain = norm(outputs.new_ones(1, len(outputs), dtype=walk.lm.dtype)).double().T
    rms = outputs.square().mean(0).sqrt()
    damping = (_NORM_DAMPING * gain.abs().median()).square()
    return gain * residuals / (gain.square() + damping) * rms


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
    """The part of δ that is still to be written at the value layer, [d, B] float64.

    It is the share of the block's shift by δ that earlier layers have not written: all of it if one layer is edited.

    Args:
        walk: a walk at the MLP's matrix of the value layer.
        outputs: the MLP's outputs with δ, [d, B].
        left: the block's output with δ minus its present output, [d, B].
    """
    delta = outputs - walk.outputs(walk.place)
    shift = behind_norm(walk, walk.layer, delta)
    return (left * shift).sum(0) / shift.square().sum(0).clamp(min=1e-30) * delta
