"""The closed-form least-squares update of one weight matrix, and its preservation term.

With keys K [d_in, B], residuals R = V - W K [d_out, B] and a preservation term A [d_in, d_in]:

    X     = A⁻¹ K
    right = X (γ I + Kᵀ X)⁻¹
    ΔW    = R rightᵀ

At γ = 1, ΔW minimises ||ΔW K - R||² + tr(ΔW A ΔWᵀ) (MEMIT, Meng et al., 2023, arXiv 2210.07229, eq. 14). At γ = 0, ΔW
minimises tr(ΔW A ΔWᵀ) subject to ΔW K = R (ROME, Meng et al., 2022, arXiv 2202.05262, eq. 2, and EMMET, Gupta et al.,
2024, arXiv 2403.14236). The system that is solved is B × B instead of d_in × d_in, and no inverse is formed.
"""

from copy import copy

import torch
from torch import Tensor

from lightedit.errors import ArgumentError
from lightedit.lm.changes import LowRankUpdate
from lightedit.ops import preservation_memorization_solve

_FOLD = 1 / 3  # past keys beyond this share of the matrix's size are folded into its factor


class IndefiniteTermError(ArgumentError):
    """A preservation term is not positive definite."""


class Preservation:
    """The preservation term A, which weighs changes of a matrix's outputs; factored once, in float64.

    Args:
        matrix: A, [d_in, d_in], symmetric positive definite; with a basis, A within its span, [r, r]. A vector is the
            diagonal of a diagonal A.
        basis: U [d_in, r] with orthonormal columns. Changes stay within its span: A⁻¹ = U matrix⁻¹ Uᵀ. None stands
            for the whole space.

    Raises:
        ArgumentError: A is not positive definite.
    """

    def __init__(self, matrix: Tensor, basis: Tensor | None = None) -> None:
        self._basis = basis
        self._factor = _cholesky(matrix)
        self._past = self._solved = matrix.new_empty(matrix.shape[0], 0, dtype=torch.float64)
        self._gram_factor = matrix.new_empty(0, 0, dtype=torch.float64)

    @classmethod
    def from_covariance(cls, covariance: Tensor, scale: float = 1.0, ridge: float = 0.0) -> "Preservation":
        """A = scale * C0 + ridge * I, with C0 the mean second moment of the keys, [d_in, d_in]."""
        matrix = scale * covariance.double()
        matrix.diagonal().add_(ridge)
        return cls(matrix)

    @classmethod
    def from_null_space(
        cls, eigenvalues: Tensor, eigenvectors: Tensor, threshold: float, ridge: float
    ) -> "Preservation":
        """A⁻¹ = P / ridge, where P projects on the eigenvectors of C0 whose eigenvalue is below `threshold`.

        Args:
            eigenvalues: of C0, [d_in].
            eigenvectors: of C0, as columns, [d_in, d_in].
            threshold: upper bound of the eigenvalues of the null space.
            ridge: weight of the update's squared norm.

        Raises:
            ArgumentError: no eigenvalue is below the threshold.
        """
        basis = eigenvectors[:, eigenvalues < threshold].double()
        if not basis.shape[1]:
            raise ArgumentError(
                f"no eigenvalue of the covariance is below {threshold:g}: they go from {float(eigenvalues.min()):.2g} "
                f"to {float(eigenvalues.max()):.2g}; raise the threshold, or make it relative"
            )
        return cls(basis.new_full(basis.shape[1:], ridge), basis)

    def to(self, device: torch.device) -> "Preservation":
        """Move to `device` and return itself; call it before `remember`."""
        self._factor, self._past = self._factor.to(device), self._past.to(device)
        self._solved, self._gram_factor = self._past, self._gram_factor.to(device)
        self._basis = None if self._basis is None else self._basis.to(device)
        return self

    def solve(self, keys: Tensor) -> Tensor:
        """(A + Kp Kpᵀ)⁻¹ K for K [..., d_in, B] and the past keys Kp, in float64."""
        if keys.ndim > 2:  # one factor serves all edits of a batch
            columns = keys.movedim(-2, 0)
            return self.solve(columns.flatten(1)).unflatten(1, columns.shape[1:]).movedim(0, -2)
        keys = self._within(keys)
        solved = self._solve_factor(keys)
        if self._past.shape[1]:  # Woodbury identity: A need not be factored again
            solved -= self._solved @ torch.cholesky_solve(self._past.T @ solved, self._gram_factor)
        return solved if self._basis is None else self._basis @ solved

    def remember(self, keys: Tensor) -> None:
        """Add past keys K [d_in, B] to the preservation term: A becomes A + K Kᵀ."""
        keys = self._within(keys)
        self._past = torch.cat([self._past, keys], dim=1)
        if self._past.shape[1] > _FOLD * len(self._factor):
            self._factor = self._lower()
            self._past = self._solved = self._past[:, :0]
            return
        self._solved = torch.cat([self._solved, self._solve_factor(keys)], dim=1)
        gram = self._past.T @ self._solved
        gram.diagonal().add_(1.0)
        self._gram_factor = _cholesky(gram)

    def with_keys(self, keys: Tensor) -> "Preservation":
        """A copy that holds past keys K [d_in, B] in addition."""
        other = copy(self)
        other.remember(keys)
        return other

    def gram_eigenvalues(self, keys: Tensor) -> Tensor:
        """The eigenvalues of Kᵀ (A + Kp Kpᵀ)⁻¹ K that may differ from 0, for K [d_in, B] with B above d_in, [d_in]."""
        keys = self._within(keys)
        lower = self._lower()
        half = keys / lower[:, None] if lower.ndim == 1 else torch.linalg.solve_triangular(lower, keys, upper=False)
        return torch.linalg.eigvalsh(half @ half.T)

    def _lower(self) -> Tensor:
        """The factor of A + Kp Kpᵀ; a vector if it is diagonal."""
        if not self._past.shape[1]:
            return self._factor
        lower = self._factor.diag() if self._factor.ndim == 1 else self._factor.tril()
        return _cholesky(lower @ lower.T + self._past @ self._past.T)

    def _solve_factor(self, keys: Tensor) -> Tensor:
        if self._factor.ndim == 1:
            return keys / self._factor.square()[:, None]
        # not cholesky_solve, which copies the [d_in, d_in] factor at every call
        half = torch.linalg.solve_triangular(self._factor, keys, upper=False)
        return torch.linalg.solve_triangular(self._factor.T, half, upper=True)

    def _within(self, keys: Tensor) -> Tensor:
        keys = keys.to(self._factor)
        return keys if self._basis is None else self._basis.T @ keys


def _cholesky(matrix: Tensor) -> Tensor:
    """L with A = L Lᵀ; for a diagonal A, given as a vector, the square root of the vector."""
    matrix = matrix.double()
    if matrix.ndim == 1:
        factor, failed = matrix.sqrt(), (matrix > 0).logical_not().sum()
    else:
        factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise IndefiniteTermError(
            f"the preservation term of size {matrix.shape[0]} is not positive definite (minor {int(failed)}); "
            "estimate the covariance from more tokens, at least 10 per input dimension"
        )
    return factor


# Smallest relative pivot at which keys still count as independent; well above float64's rounding
_DEPENDENT = 1e-12


def low_rank_update(
    preservation: Preservation, keys: Tensor, residuals: Tensor, gamma: float, share: float | None = None
) -> LowRankUpdate:
    """The update that writes `residuals` at `keys`; for batched tensors, a batch of separate updates.

    Args:
        preservation: A, factored.
        keys: K, [..., d_in, B].
        residuals: R, [..., d_out, B].
        gamma: γ >= 0; 0 writes R exactly: ΔW K = R.
        share: if given, each solve takes the γ of `gamma_for_share` instead of `gamma`.

    Returns:
        ΔW as factors R [..., d_out, B] and right [..., d_in, B], float64.

    Raises:
        ArgumentError: γ = 0 and the keys are linearly dependent, so that no ΔW writes every residual exactly.
    """
    if keys.ndim == 2 and keys.shape[1] > keys.shape[0] and (share is not None or gamma > 0):
        if share is not None:
            gamma = float(gamma_for_share(preservation.gram_eigenvalues(keys), share))
        # X (γ I + Kᵀ X)⁻¹ = (A + K Kᵀ / γ)⁻¹ K / γ: the smaller system, if there are more keys than inputs
        right = preservation.with_keys(keys / gamma**0.5).solve(keys / gamma)
        return LowRankUpdate(residuals.to(right), right)
    solved = preservation.solve(keys)
    keys = keys.to(solved)
    if share is not None:  # X (γ I + Kᵀ X)⁻¹ = (X / γ) (I + Kᵀ X / γ)⁻¹, with a γ of its own for each solve
        of_solves = gamma_for_share(torch.linalg.eigvalsh(keys.mT @ solved), share)
        solved, gamma = solved / of_solves[..., None, None], 1.0
    right, pivots = preservation_memorization_solve(keys, solved, gamma)
    # A pivot is the part of a key that is orthogonal to earlier keys; rounding can leave it slightly above 0
    if not (pivots > (_DEPENDENT if gamma == 0 else 0.0)).all():
        raise ArgumentError(
            f"the keys of {keys.shape[-1]} facts are linearly dependent, so their residuals cannot all be met exactly; "
            "write them in separate rounds"
        )
    return LowRankUpdate(residuals.to(solved), right)


# Directions of G with less of the mean leverage are those of keys that cannot be told apart
_SEPARABLE = 1e-4


def gamma_for_share(eigenvalues: Tensor, share: float) -> Tensor:
    """The γ at which a solve writes `share` of its residuals on average over the keys' directions.

    With G = Kᵀ A⁻¹ K, the update gives ΔW K = R G (γ I + G)⁻¹. The share is the mean of e / (γ + e) over the
    eigenvalues e of G: the effective degrees of freedom of a ridge regression, per fact (Hastie, Tibshirani and
    Friedman, 2009, eq. 3.50). For one fact it is q / (γ + q), with q = kᵀ A⁻¹ k the leverage of its key.
    Eigenvalues below 1e-4 of their mean are left out. They belong to keys that are equal but for rounding, whose
    different residuals no γ writes.

    Args:
        eigenvalues: those of G, [..., n], float64.
        share: from 0 to 1, both excluded.

    Returns:
        γ, [...] float64.
    """
    counted = eigenvalues > _SEPARABLE * eigenvalues.mean(-1, keepdim=True)
    eigenvalues, odds = eigenvalues.clamp(min=0.0), (1 - share) / share
    high = (eigenvalues.amax(-1) * odds).log()
    low = (eigenvalues.where(counted, torch.inf).amin(-1) * odds).log()
    for _ in range(60):  # bisection of log γ; the share falls with γ
        middle = (low + high) / 2
        part = eigenvalues / (eigenvalues + middle.exp()[..., None])
        written = (part * counted).sum(-1) / counted.sum(-1)
        low, high = torch.where(written > share, middle, low), torch.where(written > share, high, middle)
    return ((low + high) / 2).exp()


def key_similarity(preservation: Preservation, keys: Tensor) -> Tensor:
    """Cosines between all pairs of keys [d_in, B] in the metric A⁻¹ of the update, [B, B] float64."""
    solved = preservation.solve(keys)
    gram = keys.to(solved).T @ solved
    scale = gram.diagonal().rsqrt()
    return gram * scale[:, None] * scale[None, :]
