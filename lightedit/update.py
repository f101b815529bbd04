"""Step 2: the closed-form least-squares update of one weight matrix.

With keys K [d_in, B], residuals R = V - W K [d_out, B] and a preservation term A [d_in, d_in]:

    X     = A⁻¹ K
    right = X (γ I + Kᵀ X)⁻¹
    ΔW    = R rightᵀ

which minimises ||ΔW K - R||² + tr(ΔW A ΔWᵀ) at γ = 1 (MEMIT, Meng et al., 2023, arXiv 2210.07229, eq. 14) and
minimises tr(ΔW A ΔWᵀ) subject to ΔW K = R at γ = 0 (ROME, Meng et al., 2022, arXiv 2202.05262, eq. 2, and EMMET, Gupta
et al., 2024, arXiv 2403.14236). The d x d system becomes a B x B one; no inverse is ever formed.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightedit.data.prompts import Contexts, FactPrompts
from lightedit.keys import KeyWalk
from lightedit.lm import LanguageModel
from lightedit.lm.weights import LowRankUpdate

if TYPE_CHECKING:
    from lightedit.methods import Method


class Preservation:
    """The term A that keeps a matrix's outputs on everything else, factored once in float64.

    Args:
        matrix: A, [d_in, d_in], symmetric positive definite.

    Raises:
        ValueError: A is not positive definite.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._factor, failed = torch.linalg.cholesky_ex(matrix.double())
        if failed:
            raise ValueError(
                f"the preservation term of size {matrix.shape[0]} is not positive definite (minor {int(failed)}); "
                "estimate the covariance from more tokens, at least 10 per input dimension"
            )

    @classmethod
    def from_covariance(cls, covariance: Tensor, scale: float = 1.0) -> "Preservation":
        """A = scale * C0, with C0 the mean second moment of the keys, [d_in, d_in]."""
        return cls(scale * covariance.double())

    def solve(self, keys: Tensor) -> Tensor:
        """A⁻¹ K for K [d_in, B], in float64."""
        return torch.cholesky_solve(keys.to(self._factor), self._factor)


# Share of a key's squared length that must not be in the span of other keys, well above float64's rounding
_DEPENDENT = 1e-12


def low_rank_update(preservation: Preservation, keys: Tensor, residuals: Tensor, gamma: float) -> LowRankUpdate:
    """The update that writes `residuals` at `keys`.

    Args:
        preservation: A, factored.
        keys: K, [d_in, B].
        residuals: R, [d_out, B].
        gamma: γ >= 0; 0 demands ΔW K = R exactly.

    Returns:
        ΔW as factors R [d_out, B] and right [d_in, B], float64.

    Raises:
        ValueError: γ = 0 and the keys are linearly dependent, so that no ΔW can meet every residual.
    """
    solved = preservation.solve(keys)
    keys = keys.to(solved)
    system = keys.T @ solved
    system.diagonal().add_(gamma)
    factor, failed = torch.linalg.cholesky_ex(system)
    # A pivot is the squared length of what a key has beyond those before it; rounding may leave a trace of nothing
    dependent = gamma == 0 and (factor.diagonal().square() <= _DEPENDENT * system.diagonal()).any()
    if failed or dependent:
        raise ValueError(
            f"the keys of {keys.shape[1]} facts are linearly dependent, so their residuals cannot all be met exactly; "
            "write them in separate rounds"
        )
    return LowRankUpdate(residuals.to(solved), torch.cholesky_solve(solved.T, factor).T)


def key_similarity(preservation: Preservation, keys: Tensor) -> Tensor:
    """Cosine of every two keys in the metric A⁻¹ in which the update tells them apart, [B, B] float64."""
    solved = preservation.solve(keys)
    gram = keys.to(solved).T @ solved
    scale = gram.diagonal().rsqrt()
    return gram * scale[:, None] * scale[None, :]


@torch.no_grad()
def write_facts(
    lm: LanguageModel,
    method: "Method",
    preservation: dict[int, Preservation],
    prompts: Sequence[FactPrompts],
    contexts: Contexts,
    targets: Tensor,
    owner: str,
) -> Iterator[tuple[int, LowRankUpdate, Tensor]]:
    """Step 2 for the facts of one round: solve and write, layer after layer.

    Args:
        lm: the model; its weights are written on behalf of `owner`.
        method: the method.
        preservation: A of each edited layer, factored.
        prompts: B facts.
        contexts: the contexts of the keys.
        targets: v at the method's site in its value layer, [d, B] float64.
        owner: name of the round's updates in the model's weights.

    Yields:
        (layer, update, keys [d_in, B] float64) right after the update was written.

    Raises:
        FloatingPointError: an update holds NaN or infinity; it is not written.
    """
    walk = KeyWalk(lm, prompts, contexts.key_weights, method.layers[0])
    for layer in method.layers:
        if layer != walk.layer:
            walk.advance(layer)
        keys = walk.keys()
        if method.site == "mlp":
            residuals = targets - lm.mlp_values(layer, keys)
        else:
            residuals = _before_norm(walk, targets - walk.present(method.value_layer))
        _check_finite(layer, keys, residuals)
        update = low_rank_update(preservation[layer], keys, method.spread(layer) * residuals, method.gamma)
        _check_finite(layer, update.left, update.right)
        update = update.to(lm.weight(layer).device, torch.promote_types(lm.dtype, torch.float32))
        lm.weights.add(owner, layer, update)
        yield layer, update, keys


def _check_finite(layer: int, *tensors: Tensor) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise FloatingPointError(f"the update of layer {layer} holds NaN or infinity; load the model in float32")


def _before_norm(walk: KeyWalk, residuals: Tensor) -> Tensor:
    """Carry residuals of the residual stream [d, B] back to the MLP's output, through the norm between them, if any.

    An RMS norm y = g m / rms(m) is inverted at the present rms(m), which is exact but for the change of that scale.
    """
    norm = walk.lm.mlp_norm(walk.layer)
    if norm is None:
        return residuals
    gain = norm(torch.ones(1, residuals.shape[0], dtype=walk.lm.dtype, device=residuals.device)).double().T
    rms = walk.present(walk.layer, "mlp").square().mean(0).sqrt()
    return torch.where(gain.abs() > 1e-6, residuals * rms / gain, 0.0)
