"""The base of adaptors that decide once for each prompt."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightedit.errors import UnsupportedModelError
from lightedit.lm.changes import Adaptor
from lightedit.lm.reading import Positions, Prompts


class PromptAdaptor(Adaptor):
    """An adaptor that decides by what enters its place at a prompt's query token, and then replaces outputs.

    A row for which it does not decide to act keeps its output bit for bit. The decision holds for the tokens that are
    generated after the prompt.

    Attributes:
        positions: the tokens whose outputs it replaces.
    """

    reads_prompts: ClassVar[bool] = True
    positions: Positions

    @abstractmethod
    def decide(self, queries: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Whether it acts on each row, [rows] bool, and what then replaces outputs, [rows, d_out].

        Args:
            queries: the place's inputs at the query tokens, [rows, d_in].
            outputs: the place's own outputs there, [rows, d_out].
        """

    def __call__(self, inputs: Tensor, output: Tensor, prompts: Prompts) -> Tensor:
        if not prompts.whole:
            raise UnsupportedModelError(
                "the model carries an adaptor that decides at a prompt's last token, which a pass that starts within "
                "a prompt cannot serve; revert that edit first"
            )
        flat = output.flatten(0, 1)
        decision: tuple[Tensor, Tensor] | None
        if prompts.query is None:
            decision = prompts.kept.get(id(self)) if self.positions == "all" else None
        else:
            query = prompts.query.to(flat.device)
            decision = self.decide(inputs.flatten(0, 1)[query], flat[query])
            if self.positions == "all":
                prompts.kept[id(self)] = decision
        if decision is None or not decision[0].any():
            return output
        acts, values = decision
        row = prompts.row.to(flat.device)
        at = (prompts.at(self.positions).to(flat.device) & acts[row]).nonzero().flatten()
        return flat.index_put((at,), values.to(flat.dtype)[row[at]]).view_as(output)

    def norm(self) -> float:
        """Frobenius norm of all its parameters together."""
        return float(sum(float(part.double().square().sum()) for part in self.parameters().values()) ** 0.5)

    def parameters(self) -> dict[str, Tensor]:
        """The tensors that are trained, by name."""
        return {name: tensor for name, tensor in self.tensors().items() if tensor.is_floating_point()}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "positions": self.positions}


def same_device(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on `device`; in `dtype`, if one is given and it holds no whole numbers."""
    return tensor.to(device, dtype if tensor.is_floating_point() else None)
