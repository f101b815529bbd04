"""KnowledgeEditor's network: a text about the fact decides how the gradient of each matrix becomes the edit."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_sequence

from lightedit.lm import Place
from lightedit.lm.changes import LowRankUpdate
from lightedit.methods.hypernetworks.factors import TokenFactors
from lightedit.methods.hypernetworks.network import HyperNetwork, Matrix


class KENetwork(HyperNetwork):
    """Computes ΔW = σ(η) (softmax(α) γᵀ ⊙ ∇W + softmax(β) ζᵀ) of each matrix W [d_out, d_in] (De Cao et al.).

    α, β [d_out], γ, ζ [d_in] and η depend on a condition text, through word embeddings, a bidirectional LSTM, and two
    layers a matrix. A product with a matrix of rank one scales rows and columns, so that ΔW has the rank of the
    gradient, which is the number of tokens, plus one.

    Args:
        matrices: the edited matrices.
        embeddings: word embeddings to begin with, [vocabulary, d].
        hidden: width of each direction of the LSTM.
        width: width of the condition.
        middle: width between the two layers of a matrix.
        dtype: dtype of the parameters.
        published: take the softmax over the rows of the matrix as it is stored, which GPT-2 stores transposed.
    """

    conditioned = True

    def __init__(
        self,
        matrices: Sequence[Matrix],
        embeddings: Tensor,
        hidden: int = 128,
        width: int = 1024,
        middle: int = 128,
        dtype: torch.dtype = torch.float32,
        published: bool = False,
    ) -> None:
        super().__init__(matrices)
        self.published = published
        self.embedding = nn.Embedding.from_pretrained(embeddings.detach().clone().to(dtype), freeze=False)
        self.lstm = nn.LSTM(embeddings.shape[1], hidden, bidirectional=True, batch_first=True, dtype=dtype)
        self.linear = nn.Linear(2 * hidden, width, dtype=dtype)
        self.conditioners = nn.ModuleDict(
            {
                matrix.place.key: nn.Sequential(
                    weight_norm(nn.Linear(width, middle, dtype=dtype)),
                    nn.Tanh(),
                    weight_norm(nn.Linear(middle, 2 * (matrix.d_out + matrix.d_in) + 1, dtype=dtype)),
                )
                for matrix in self.matrices
            }
        )

    def forward(
        self, factors: Mapping[Place, TokenFactors], conditions: Sequence[Sequence[int]] | None = None
    ) -> dict[Place, LowRankUpdate]:
        assert conditions is not None
        condition = self.condition(conditions)
        return {matrix.place: self._update(matrix, condition, factors[matrix.place]) for matrix in self.matrices}

    def condition(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The vectors of texts, given as token ids, [n, width]."""
        device = self.embedding.weight.device
        words = [self.embedding(torch.tensor(list(text), device=device)) for text in texts]
        _, (final, _) = self.lstm(pack_sequence(words, enforce_sorted=False))
        return torch.tanh(self.linear(torch.cat([final[0], final[1]], dim=-1)))

    def _update(self, matrix: Matrix, condition: Tensor, factors: TokenFactors) -> LowRankUpdate:
        grads, inputs = (
            part.masked_fill(~factors.used[..., None], 0).transpose(1, 2) for part in (factors.grads, factors.inputs)
        )
        swapped = self.published and matrix.transposed  # the softmax is then over d_in
        rows, columns = (matrix.d_in, matrix.d_out) if swapped else (matrix.d_out, matrix.d_in)
        outputs = self.conditioners[matrix.place.key](condition)
        gamma, alpha, zeta, beta, eta = outputs.split([columns, rows, columns, rows, 1], dim=-1)
        of_rows = (alpha.softmax(-1)[..., None], beta.softmax(-1)[..., None])
        of_columns = (gamma[..., None], zeta[..., None])
        out, into = (of_columns, of_rows) if swapped else (of_rows, of_columns)
        left = eta.sigmoid()[..., None] * torch.cat([out[0] * grads, out[1]], dim=-1)
        return LowRankUpdate(left, torch.cat([into[0] * inputs, into[1]], dim=-1))
