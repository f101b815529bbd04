"""Knowledge neurons as they were published: slow, literal, whole prompts through the whole model for each layer.

Written straight on a transformers model and its tokenizer, and sharing no code with the package. Procedure: Dai et al.,
2022 (arXiv 2104.08696), as the code of EleutherAI/knowledge-neurons carries it out, in the copy that made ROME's KN
row: neurons are what leaves the MLP's first matrix, before the activation; points include 0 and 1; all tokens of an
answer are attributed after the prompt; prompt and answers are tokenised apart.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.published import Request, block, mlp_output_matrix, weight_view
from benchmarks.published.tracing import embedding

_FIRST = {"gpt2": "mlp.c_fc", "gptj": "mlp.fc_in", "gpt_neox": "mlp.dense_h_to_4h"}

Side = Literal["input", "output"]


def first_matrix(model: PreTrainedModel, layer: int) -> nn.Module:
    """The matrix whose output enters the activation of the MLP of block `layer`."""
    return block(model, layer).get_submodule(_FIRST.get(model.config.model_type, "mlp.gate_proj"))


def integrated_gradients(
    model: PreTrainedModel,
    ids: Sequence[int],
    target: int,
    module: nn.Module,
    side: Side,
    points: Sequence[float],
    batch: int = 20,
) -> Tensor:
    """The attribution of p(target | ids) to the entries of one state at the last token, [width].

    Args:
        model: a causal language model.
        ids: token ids of the prompt.
        target: a token id.
        module: the module whose state it is.
        side: its input or its output.
        points: by what the state is scaled.
        batch: points of one pass.
    """
    with torch.no_grad(), _replaced(module, side, None) as seen:
        model(input_ids=torch.tensor([list(ids)]))
    state = seen[0]
    total = torch.zeros_like(state)
    scaled = torch.stack([point * state for point in points])
    for rows in scaled.split(batch):
        rows = rows.clone().requires_grad_()
        with _replaced(module, side, rows):
            logits = model(input_ids=torch.tensor([list(ids)] * len(rows))).logits
        p = logits[:, -1].softmax(-1)[:, target]
        total += torch.autograd.grad(p.sum(), rows)[0].sum(0)
    return total * state / len(points)


def published_attributions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str, answer: str, steps: int = 20
) -> Tensor:
    """The attributions of every layer's neurons, [layers, d_ff], averaged over the answer's tokens."""
    ids = tokenizer(text)["input_ids"]
    targets = tokenizer(answer, add_special_tokens=False)["input_ids"]
    points = [step / (steps - 1) for step in range(steps)]
    found = []
    for layer in range(model.config.num_hidden_layers):
        module = first_matrix(model, layer)
        each = [integrated_gradients(model, ids, target, module, "output", points) for target in targets]
        found.append(torch.stack(each).mean(0))
    return torch.stack(found)


def published_neurons(attributions: Tensor, threshold: float = 0.2) -> list[tuple[int, int]]:
    """(layer, index) of each neuron whose attribution is more than a share of the largest one."""
    return [(int(i), int(j)) for i, j in (attributions > threshold * attributions.max()).nonzero()]


@torch.no_grad()
def published_kn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    request: Request,
    neurons: Sequence[tuple[int, int]],
) -> dict[int, Tensor]:
    """The weight changes that write a fact into its neurons, layer -> ΔW [d, d_in]. The model's weights end unchanged.

    From the value of each neuron, twice the embedding of the model's present next token is subtracted. The embeddings
    of all tokens of the target are added once.
    """
    ids = tokenizer(request.prompt.replace("{}", request.subject))["input_ids"]
    said = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    targets = tokenizer(request.target, add_special_tokens=False)["input_ids"]
    words = embedding(model).weight
    changes: dict[int, Tensor] = {}
    for layer, neuron in neurons:
        weight = weight_view(model, layer)
        before = weight.clone()
        weight[:, neuron] -= 2 * words[said]
        for token in targets:
            weight[:, neuron] += words[token]
        changes[layer] = changes.get(layer, 0) + weight - before
        weight.copy_(before)
    return changes


def key_module(model: PreTrainedModel, layer: int) -> nn.Module:
    """The module whose input is the key of block `layer`: the MLP's second matrix."""
    return mlp_output_matrix(model, layer)


@contextmanager
def _replaced(module: nn.Module, side: Side, rows: Tensor | None) -> Any:
    """Within the context, the state of the last token is `rows`, or it is read: yields the list of the states seen."""
    seen: list[Tensor] = []

    def last(state: Tensor) -> Tensor:
        seen.append(state.reshape(-1, state.shape[-1])[-1].detach().clone())
        if rows is None:
            return state
        by_row = state.reshape(len(rows), -1, state.shape[-1])  # OPT's MLP sees [rows * tokens, d]
        return torch.cat([by_row[:, :-1], rows[:, None]], dim=1).view_as(state)

    if side == "input":
        handle = module.register_forward_pre_hook(lambda _, args: (last(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda _, __, output: last(output))
    try:
        yield seen
    finally:
        handle.remove()
