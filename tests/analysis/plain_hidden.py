"""The study of hidden states as a plain loop over prompts, and as it was published; written without the package."""

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.published import block
from benchmarks.published.tracing import part

PARALLEL = {"falcon", "gpt_neox", "gptj"}
POST_NORM = {"gemma2", "gemma3_text", "olmo2"}
_FINAL_NORM = {
    **dict.fromkeys(("bloom", "falcon", "gpt2", "gptj"), "transformer.ln_f"),
    "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
}
_FIRST_NORM = {"gpt2": "ln_1", "gptj": "ln_1", "opt": "self_attn_layer_norm"}


@torch.no_grad()
def states(model: PreTrainedModel, ids: list[int], after_norm: bool) -> dict[str, list[Tensor]]:
    """h, a, m and ln_1(h) of every layer at the last token, each [d]; a and m before or after the norm behind them."""
    kind = model.config.model_type
    seen: dict[str, list[Tensor]] = {name: [] for name in ("h", "a", "m", "ln_1(h)")}
    handles = []

    def keep(name: str, state: Tensor) -> None:
        seen[name].append(state.reshape(-1, state.shape[-1])[-1].clone())  # Falcon adds in place

    for layer in range(model.config.num_hidden_layers):
        one = block(model, layer)
        attention, mlp = part(model, "attention", layer), part(model, "mlp", layer)
        if after_norm and kind in POST_NORM:
            attention, mlp = one.post_attention_layernorm, one.post_feedforward_layernorm
        handles += [
            one.register_forward_pre_hook(lambda _, args: keep("h", args[0])),
            attention.register_forward_hook(lambda _, __, output: keep("a", output)),
            mlp.register_forward_hook(lambda _, __, output: keep("m", output)),
        ]
        if kind == "olmo2":  # its attention reads h itself
            handles.append(one.register_forward_pre_hook(lambda _, args: keep("ln_1(h)", args[0])))
        else:
            norm = one.get_submodule(_FIRST_NORM.get(kind, "input_layernorm"))
            handles.append(norm.register_forward_hook(lambda _, __, output: keep("ln_1(h)", output)))
    model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def plain(
    model: PreTrainedModel, ids: list[int], top: int, after_norm: bool = True, block_input: bool = False
) -> dict[str, list[tuple[float, float]]]:
    """Part -> (cosine, Jaccard similarity) by layer, of one prompt."""
    kind = model.config.model_type
    norm = model.get_submodule(_FINAL_NORM.get(kind, "model.norm"))
    seen, added = states(model, ids, after_norm), states(model, ids, True)["a"]

    def top_set(state: Tensor) -> set[int]:
        return set(model.get_output_embeddings()(norm(state[None, None]))[0, 0].topk(top).indices.tolist())

    def compared(one: Tensor, other: Tensor) -> tuple[float, float]:
        sets = top_set(one), top_set(other)
        cosine = float(one.double() @ other.double() / (one.double().norm() * other.double().norm()))
        return cosine, len(sets[0] & sets[1]) / len(sets[0] | sets[1])

    found: dict[str, list[tuple[float, float]]] = {"attention": [], "mlp": []}
    for h, a, m, given in zip(seen["h"], seen["a"], seen["m"], added, strict=True):
        found["attention"].append(compared(h, a))
        found["mlp"].append(compared(h if block_input or kind in PARALLEL else h + given, m))
    return found


@torch.no_grad()
def published(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], k: int
) -> dict[str, list[tuple[float, float]]]:
    """Part -> (cosine, Jaccard similarity) by layer, of one prompt, in the steps of PMET's released notebook."""
    embeddings = model.get_input_embeddings().weight.detach()
    seen = states(model, ids, after_norm=False)
    found: dict[str, list[tuple[float, float]]] = {"attention": [], "mlp": []}
    for name, letter in (("attention", "a"), ("mlp", "m")):
        for in_hs, ot_hs in zip(seen["ln_1(h)"], seen[letter], strict=True):
            in_ind = numpy.argsort(-in_hs.matmul(embeddings.T).numpy())
            ot_ind = numpy.argsort(-ot_hs.matmul(embeddings.T).numpy())
            in_topks = [tokenizer.decode([i]) for i in in_ind[:k]]
            ot_topks = [tokenizer.decode([i]) for i in ot_ind[:k]]
            intersection = len(list(set(in_topks).intersection(ot_topks)))
            union = (len(in_topks) + len(ot_topks)) - intersection
            found[name].append((float(torch.cosine_similarity(in_hs, ot_hs, dim=0)), float(intersection) / union))
    return found
