"""MEND's network: it maps the two factors of each token's gradient to the factors of the edit."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightedit.errors import NumericalError
from lightedit.lm import Place
from lightedit.lm.changes import LowRankUpdate
from lightedit.methods.hypernetworks.factors import TokenFactors
from lightedit.methods.hypernetworks.network import HyperNetwork, Matrix

_EPS = 1e-7  # added to standard deviations
_LAYERS = 2


class _Residual(nn.Module):
    """One layer z + clamp(s ⊙ (U V z + b) + o, min 0), with s and o for each of several matrices.

    U is 0 at the start, so that the layer is the identity. A clamp has the gradient 1 at 0, where a ReLU has 0.
    """

    def __init__(self, width: int, rank: int, matrices: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(width, rank, dtype=dtype))
        self.v = nn.Parameter(torch.randn(rank, width, dtype=torch.float32).to(dtype))
        self.bias = nn.Parameter(torch.zeros(width, dtype=dtype))
        self.scale = nn.Parameter(torch.ones(matrices, width, dtype=dtype))
        self.offset = nn.Parameter(torch.zeros(matrices, width, dtype=dtype))

    def forward(self, z: Tensor, matrix: int) -> Tensor:
        product = F.linear(F.linear(z, self.v), self.u, self.bias)
        return z + (self.scale[matrix] * product + self.offset[matrix]).clamp(min=0)


class _OfShape(nn.Module):
    """The network that all matrices of one shape share, and the statistics of its inputs.

    Attributes:
        count: tokens seen, int64.
        mean: mean of the tokens' factors, inputs before gradients, [d_in + d_out].
        squares: sum of squared differences from the mean, [d_in + d_out].
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int, rank: int, matrices: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Residual(width, min(rank, width), matrices, dtype) for _ in range(_LAYERS))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(width, dtype=dtype))
        self.register_buffer("squares", torch.zeros(width, dtype=dtype))

    @torch.no_grad()
    def observe(self, tokens: Tensor) -> None:
        """Add tokens [n, d_in + d_out] to the statistics (Welford's sums, merged as Chan et al. do)."""
        if not len(tokens):
            return
        total = self.count + len(tokens)
        mean = tokens.mean(0)
        shift = mean - self.mean
        self.squares += (tokens - mean).square().sum(0) + shift.square() * (self.count * len(tokens) / total)
        self.mean += shift * (len(tokens) / total)
        self.count.copy_(total)

    def normalised(self, tokens: Tensor) -> Tensor:
        """Tokens [n, d_in + d_out] in units of the standard deviation of each entry."""
        if self.count < 2:
            raise NumericalError(
                f"the network has seen {int(self.count)} tokens, and normalises by the statistics of at least 2; "
                "train it, or set norm to false"
            )
        return (tokens - self.mean) / ((self.squares / (self.count - 1)).sqrt() + _EPS)

    def forward(self, tokens: Tensor, matrix: int) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens, matrix)
        return tokens


class MENDNetwork(HyperNetwork):
    """Maps the factors (u_t, δ_t) of each token to (ũ_t, δ̃_t); the edit is ΔW = -η Σ_t δ̃_t ũ_tᵀ (Mitchell et al.).

    All matrices of one shape share a network of two residual layers on [u_t; δ_t], each entry normalised by its running
    mean and standard deviation. Each matrix has its own learned rate η.

    Args:
        matrices: the edited matrices.
        rank: r of U [d_in + d_out, r] and V [r, d_in + d_out], at most the width.
        norm: whether factors are normalised.
        rate: η before training.
        ascend: add the edit instead of subtracting it, as published.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        rank: int = 1920,
        norm: bool = True,
        rate: float = 1e-4,
        ascend: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(matrices)
        self.norm, self.ascend = norm, ascend
        shapes: dict[str, list[Matrix]] = {}
        for matrix in self.matrices:
            shapes.setdefault(_shape(matrix), []).append(matrix)
        self._of_shape = shapes
        self.networks = nn.ModuleDict(
            {
                shape: _OfShape(members[0].d_in + members[0].d_out, rank, len(members), dtype)
                for shape, members in shapes.items()
            }
        )
        self.rates = nn.ParameterDict(
            {matrix.place.key: nn.Parameter(torch.tensor(rate, dtype=dtype)) for matrix in self.matrices}
        )

    @property
    def fresh(self) -> bool:
        """Whether statistics of factors are needed before the first edit."""
        return self.norm and any(int(network.count) < 2 for network in self._networks())

    def _networks(self) -> list[_OfShape]:
        return [network for network in self.networks.values() if isinstance(network, _OfShape)]

    def observe(self, factors: Mapping[Place, TokenFactors]) -> None:
        """Add the tokens of each row to the running statistics."""
        for shape, members in self._of_shape.items():
            network = self.networks[shape]
            assert isinstance(network, _OfShape)
            network.observe(torch.cat([_tokens(factors[matrix.place]) for matrix in members]))

    def forward(
        self, factors: Mapping[Place, TokenFactors], conditions: Sequence[Sequence[int]] | None = None
    ) -> dict[Place, LowRankUpdate]:
        """The edit of each row; in training, their tokens are added to the statistics first."""
        if self.training and self.norm:
            self.observe(factors)
        return {
            matrix.place: self._update(matrix, number, self.networks[shape], factors[matrix.place])
            for shape, members in self._of_shape.items()
            for number, matrix in enumerate(members)
        }

    def _update(self, matrix: Matrix, number: int, network: nn.Module, factors: TokenFactors) -> LowRankUpdate:
        assert isinstance(network, _OfShape)
        tokens = _tokens(factors)
        mapped = network(network.normalised(tokens) if self.norm else tokens, number)
        right, left = mapped.split([matrix.d_in, matrix.d_out], dim=-1)
        rate = self.rates[matrix.place.key]
        left = (rate if self.ascend else -rate) * left
        where = factors.used.nonzero(as_tuple=True)
        blank = tokens.new_zeros(*factors.used.shape, 1)
        rows = [
            blank.expand(*factors.used.shape, part.shape[-1]).index_put(where, part).transpose(1, 2)
            for part in (left, right)
        ]
        return LowRankUpdate(*rows)


def _shape(matrix: Matrix) -> str:
    return f"{matrix.d_out}x{matrix.d_in}"


def _tokens(factors: TokenFactors) -> Tensor:
    """The factors of the tokens that are used, [n, d_in + d_out]."""
    return torch.cat([factors.inputs[factors.used], factors.grads[factors.used]], dim=-1)
