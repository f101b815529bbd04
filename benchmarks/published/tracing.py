"""Causal tracing as it was published: slow, literal, one forward pass of the whole model for each cell.

Written straight on a transformers model, and sharing no code with the package. Procedure: Meng et al., 2022 (ROME,
arXiv 2202.05262), in the order of steps of their released code: row 0 of a batch is the clean run, the others are
corrupted, and a hook copies row 0 into the others where a state is restored.

It corrects what that code does to models other than its own: modules are those whose output is what is added to the
residual stream, outputs are copied before they are written, and the noise is given.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.published import block, mlp_output_matrix

_EMBEDDINGS = {
    "bloom": "transformer.word_embeddings",
    "falcon": "transformer.word_embeddings",
    "gpt2": "transformer.wte",
    "gpt_neox": "gpt_neox.embed_in",
    "gptj": "transformer.wte",
    "opt": "model.decoder.embed_tokens",
}
_ATTENTION = {
    "bloom": "self_attention.dense",
    "falcon": "self_attention.dense",
    "gpt2": "attn.c_proj",
    "gpt_neox": "attention.dense",
    "gptj": "attn.out_proj",
    "opt": "self_attn.out_proj",
}


def embedding(model: PreTrainedModel) -> nn.Module:
    """The token embeddings."""
    return model.get_submodule(_EMBEDDINGS.get(model.config.model_type, "model.embed_tokens"))


def part(model: PreTrainedModel, kind: str, layer: int) -> nn.Module:
    """The module whose output is restored: the block, or the matrix that ends its MLP or its attention."""
    if kind == "state":
        return block(model, layer)
    if kind == "mlp":
        return mlp_output_matrix(model, layer)
    return block(model, layer).get_submodule(_ATTENTION.get(model.config.model_type, "self_attn.o_proj"))


@torch.no_grad()
def traced(
    model: PreTrainedModel,
    ids: Sequence[int],
    targets: Sequence[int],
    subject: range,
    noise: Tensor,
    restored: Sequence[tuple[int, nn.Module]],
    held: Sequence[tuple[int, nn.Module, Tensor]] = (),
) -> Tensor:
    """Joint probability of the answer in each corrupted run, [S], with some states restored.

    Args:
        model: a causal language model.
        ids: the prompt's token ids, followed by the answer's without its last one.
        targets: the answer's token ids.
        subject: positions of the subject's tokens.
        noise: what is added to their embeddings, [S, subject tokens, d].
        restored: (position, module) of each state that is copied from the clean run.
        held: (position, module, output in each run [S + 1, d]) of each state that is fixed, for severed paths.
    """
    rows = len(noise) + 1

    def embed(output: Tensor) -> Tensor:
        output[1:, subject.start : subject.stop] += noise
        return output

    def restore(position: int) -> Callable[[Tensor], Tensor]:
        def change(output: Tensor) -> Tensor:
            output[1:, position] = output[0, position]
            return output

        return change

    def fix(position: int, states: Tensor) -> Callable[[Tensor], Tensor]:
        def change(output: Tensor) -> Tensor:
            output[:, position] = states
            return output

        return change

    with ExitStack() as stack:
        stack.callback(_hooked(embedding(model), rows, embed))
        for position, module in restored:
            stack.callback(_hooked(module, rows, restore(position)))
        for position, module, states in held:
            stack.callback(_hooked(module, rows, fix(position, states)))
        logits = model(input_ids=torch.tensor([list(ids)] * rows)).logits
    log_p = logits[1:, len(ids) - len(targets) :].float().log_softmax(-1)
    return log_p.gather(2, torch.tensor(targets).expand(rows - 1, -1)[..., None])[..., 0].sum(1).exp()


@torch.no_grad()
def outputs(model: PreTrainedModel, ids: Sequence[int], subject: range, noise: Tensor, kind: str) -> list[Tensor]:
    """The outputs of every layer's module of `kind` in the clean run and the corrupted ones, each [S + 1, T, d]."""
    rows = len(noise) + 1
    found: list[Tensor] = []

    def embed(output: Tensor) -> Tensor:
        output[1:, subject.start : subject.stop] += noise
        return output

    def keep(output: Tensor) -> Tensor:
        found.append(output.clone())
        return output

    with ExitStack() as stack:
        stack.callback(_hooked(embedding(model), rows, embed))
        for layer in range(model.config.get_text_config().num_hidden_layers):
            stack.callback(_hooked(part(model, kind, layer), rows, keep))
        model(input_ids=torch.tensor([list(ids)] * rows))
    return found


def _hooked(module: nn.Module, rows: int, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Let `change` replace the module's output [rows, T, d]; returns the function that removes it."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        changed = change(whole.reshape(rows, -1, whole.shape[-1]).clone()).view_as(whole)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return module.register_forward_hook(hook).remove


def window_modules(model: PreTrainedModel, kind: str, layer: int, window: int, n_layers: int) -> list[nn.Module]:
    """The modules of the window around `layer` that are restored together."""
    first, stop = max(0, layer - window // 2), min(n_layers, layer - (-window // 2))
    return [part(model, kind, each) for each in range(first, stop)]
