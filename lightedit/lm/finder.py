"""Find the places of a model whose type has no row in the table: its blocks, and each block's matrices."""

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightedit.errors import UnsupportedModelError
from lightedit.lm.architectures import ARCHITECTURES, Architecture, blocks_of
from lightedit.lm.place import Name

# A module whose `forward` takes one of these mixes tokens. An MLP takes hidden states alone.
_OF_TOKENS = frozenset(
    (
        *("attention_mask", "mask", "position_ids", "position_embeddings", "alibi"),
        *("past_key_values", "past_key_value", "layer_past", "cache_params", "cache", "state"),
    )
)
_SECOND = ("down_proj", "c_proj", "fc2", "fc_out", "w2", "dense_4h_to_h", "output_linear", "lin2")
_QKV = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("Wq", "Wk", "Wv"),
)
_OUT = ("o_proj", "out_proj", "dense", "c_proj", "wo", "Wo")
_GATES = (("gate_proj", "up_proj"), ("w1", "w3"))
_FUSED_GATE = "gate_up_proj"  # the gate's rows, then those of the other matrix


def architecture_of(model: PreTrainedModel) -> Architecture:
    """The registered row of `model`'s type, or what `find_architecture` finds.

    Raises:
        UnsupportedModelError: see `find_architecture`.
    """
    return ARCHITECTURES.get(model.config.model_type) or find_architecture(model)


def find_architecture(model: PreTrainedModel) -> Architecture:
    """Find the places of `model` by structure, shapes and names, and the norm after the MLP by one forward pass.

    The blocks are the largest list of as many modules as the text model has layers, also within a wrapper such as
    `Gemma3ForConditionalGeneration`. In each block, the MLP's second matrix is the one linear map to the residual
    stream's width outside of attention. Other places are left out where they cannot be told. What is found is a
    hypothesis: `measure` proves it when the model becomes a `LanguageModel`.

    Args:
        model: a causal language model with its weights, in evaluation mode.

    Raises:
        UnsupportedModelError: no such blocks, or a block without exactly one such matrix.
    """
    found = structure_of(model)
    return replace(found, mlp_norm=_norm_after_mlp(model, found))


def structure_of(model: PreTrainedModel) -> Architecture:
    """What the modules alone say, without a forward pass; works on a model without weights (device "meta").

    Raises:
        UnsupportedModelError: see `find_architecture`.
    """
    path, blocks = _block_list(model)
    width = width_of(model)
    kind = model.config.model_type
    (mlp, _), *others = [_second_matrix(block, width, f"{kind}: {path}.{i}") for i, block in enumerate(blocks)]
    for layer, (other, _) in enumerate(others, start=1):
        if other != mlp:
            raise UnsupportedModelError(
                f"{kind} has blocks of several kinds: the MLP's second matrix is {mlp} in layer 0 and {other} in layer "
                f"{layer}; expected equal blocks"
            )
    paths: dict[Name, str] = {}
    for names in (_attention_paths, _mlp_paths):
        each = [names(block, width, mlp) for block in blocks]
        paths |= {name: place for name, place in each[0].items() if all(e.get(name) == place for e in each)}
    order = ("q", "k", "v", "attention_out", "mlp_gate", "mlp_in")
    parameters = inspect.signature(type(model).forward).parameters
    return Architecture(
        embedding=_name_of(model, model.get_input_embeddings()),
        blocks=path,
        paths={name: paths[name] for name in order if name in paths} | {"mlp": mlp},
        takes_position_ids="position_ids" in parameters,
    )


def width_of(model: PreTrainedModel) -> int:
    """The width d of the residual stream."""
    width = getattr(model.config.get_text_config(decoder=True), "hidden_size", None)
    return int(width or embedding_of(model).shape[1])


def embedding_of(model: PreTrainedModel) -> Tensor:
    """The weight of the token embeddings, [vocabulary, d]."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _block_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The path and the list of the transformer blocks."""
    width = width_of(model)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and any(d == width for *_, d in _linear_maps(module))
    }
    layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    fitting = {name: module for name, module in lists.items() if len(module) == layers} or lists
    if not fitting:
        raise UnsupportedModelError(
            f"{model.config.model_type} has no list of transformer blocks: expected an nn.ModuleList of {layers} "
            f"modules with linear maps to the residual stream's width {width}"
        )
    return max(fitting.items(), key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))


def _linear_maps(module: nn.Module) -> Iterator[tuple[str, nn.Module, int, int]]:
    """(path, module, d_in, d_out) of every linear map inside `module`."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            yield name, part, part.in_features, part.out_features
        elif isinstance(part, Conv1D):
            yield name, part, part.nx, part.nf


def _mixes_tokens(name: str, module: nn.Module) -> bool:
    takes = inspect.signature(type(module).forward).parameters
    return bool(_OF_TOKENS & takes.keys()) or bool(re.search("attn|attention", f"{name} {type(module).__name__}", re.I))


def _outside_attention(block: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the parts of `block` that treat each token separately."""
    for name, part in block.named_children():
        if isinstance(part, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            yield from _outside_attention(part, f"{prefix}{name}.")
        elif not _mixes_tokens(name, part) or is_norm(part):
            yield f"{prefix}{name}", part


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class."""
    return "norm" in type(module).__name__.lower() and not any(True for _ in _linear_maps(module))


def _per_token_maps(block: nn.Module) -> list[tuple[str, int, int]]:
    """(path, d_in, d_out) of the linear maps outside of attention."""
    maps = []
    for path, part in _outside_attention(block):
        maps += [(f"{path}.{inner}".rstrip("."), d_in, d_out) for inner, _, d_in, d_out in _linear_maps(part)]
    return maps


def _second_matrix(block: nn.Module, width: int, where: str) -> tuple[str, int]:
    """The path of the MLP's second matrix in a block, and its d_in."""
    for path, part in _outside_attention(block):
        for name, parameter in part.named_parameters():
            if parameter.ndim > 2:
                whole = f"{path}.{name}"
                what = "a mixture of experts" if "expert" in whole else "not one MLP"
                raise UnsupportedModelError(
                    f"{where} holds {what} ({whole} of {list(parameter.shape)}); expected one MLP of linear maps"
                )
    maps = {path: d_in for path, d_in, d_out in _per_token_maps(block) if d_out == width}
    if len(maps) > 1 and set(maps.values()) == {width}:  # the MLP is as narrow as the residual stream
        maps = {path: d_in for path, d_in in maps.items() if path.rpartition(".")[2] in _SECOND} or maps
    if len(maps) != 1:
        raise UnsupportedModelError(
            f"{where} has {'more than one MLP' if maps else 'no MLP'}: expected one linear map to the residual "
            f"stream's width {width} outside of attention, found {', '.join(maps) or 'none'}"
        )
    if not any(_mixes_tokens(name, part) for name, part in block.named_modules() if name):
        raise UnsupportedModelError(f"{where} holds an MLP without attention; expected both in every block")
    return next(iter(maps.items()))


def _mlp_paths(block: nn.Module, width: int, mlp: str) -> dict[Name, str]:
    """The MLP's first matrix and its gate, as far as names and shapes tell them."""
    maps = _per_token_maps(block)
    inner = next(d_in for path, d_in, _ in maps if path == mlp)
    first = {path.rpartition(".")[2]: path for path, d_in, d_out in maps if (d_in, d_out) == (width, inner)}
    first = {name: path for name, path in first.items() if path != mlp}
    for gate, other in _GATES:
        if first.keys() == {gate, other}:
            return {"mlp_gate": first[gate], "mlp_in": first[other]}
    if len(first) == 1:
        return {"mlp_in": next(iter(first.values()))}
    fused = [path for path, d_in, d_out in maps if (d_in, d_out) == (width, 2 * inner)]
    if not first and len(fused) == 1 and fused[0].endswith(_FUSED_GATE):
        return {"mlp_gate": fused[0], "mlp_in": fused[0]}
    return {}


def _attention_paths(block: nn.Module, width: int, mlp: str) -> dict[Name, str]:
    """The attention's matrices, as far as names and shapes tell them."""
    maps = {path: (d_in, d_out) for path, _, d_in, d_out in _linear_maps(block)}
    inside = maps.keys() - {path for path, *_ in _per_token_maps(block)}
    parents = {
        parent: names
        for names in _QKV
        for parent in {path.rpartition(".")[0] for path in inside}
        if all(f"{parent}.{name}" in inside for name in names)
    }
    if len(parents) > 1:
        return {}
    q, k, v = next(((f"{p}.{a}", f"{p}.{b}", f"{p}.{c}") for p, (a, b, c) in parents.items()), ("", "", ""))
    outs = [path for path in inside - {q, k, v} if maps[path][1] == width and path.rpartition(".")[2] in _OUT]
    outs = [path for path in outs if not parents or path.startswith(f"{q.rpartition('.')[0]}.")]
    if len(outs) != 1:
        return {}
    told = bool(parents) and all(maps[path][0] == width for path in (q, k, v)) and maps[k] == maps[v]
    if not told or maps[q][1] != maps[outs[0]][0]:  # q may hold more than queries, such as a gate
        return {"attention_out": outs[0]}
    return {"q": q, "k": k, "v": v, "attention_out": outs[0]}


@torch.no_grad()
def _norm_after_mlp(model: PreTrainedModel, found: Architecture) -> str | None:
    """The path inside a block to the norm that the MLP's output enters; None if no block has one."""
    blocks = blocks_of(model, found)
    norms: list[str | None] = [None] * len(blocks)
    made: dict[int, Tensor] = {}
    handles = []

    def entered(layer: int, name: str, args: tuple[Any, ...]) -> None:
        state = made.get(layer)
        if state is None or norms[layer] is not None or not args or args[0].numel() != state.numel():
            return
        if torch.equal(args[0].flatten(), state.flatten()):
            norms[layer] = name

    for layer, block in enumerate(blocks):
        matrix = block.get_submodule(found.paths["mlp"])
        handles.append(matrix.register_forward_hook(lambda _, __, out, layer=layer: made.update({layer: out})))
        for name, part in block.named_modules():
            if is_norm(part):
                handles.append(
                    part.register_forward_pre_hook(lambda _, a, layer=layer, name=name: entered(layer, name, a))
                )
    try:
        run(model, input_ids=probe_tokens(model, 3)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return _common_norm(norms, blocks, model.config.model_type)


def _common_norm(norms: list[str | None], blocks: Iterable[nn.Module], kind: str) -> str | None:
    names = set(norms) - {None}
    if not names:
        return None
    path = names.pop()
    assert path is not None
    absent = [block for norm, block in zip(norms, blocks, strict=True) if norm is None]
    if names or any(path in dict(block.named_modules()) for block in absent):
        raise UnsupportedModelError(
            f"{kind} has blocks of several kinds: after the MLP come {sorted(set(map(str, norms)))}; expected one norm"
        )
    return path


def run(model: PreTrainedModel, **arguments: Any) -> Tensor:
    """The logits of a forward pass.

    Raises:
        UnsupportedModelError: the model does not take what transformers' causal language models take.
    """
    try:
        return model(**arguments).logits
    except (TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
        raise UnsupportedModelError(
            f"{model.config.model_type}: a forward pass with {', '.join(arguments)} fails ({error}); expected a model "
            "that takes these, as transformers' causal language models do, and returns logits"
        ) from error


def probe_tokens(model: PreTrainedModel, count: int) -> Tensor:
    """Distinct token ids amid the vocabulary, away from padding and special tokens; [count]."""
    embedding = embedding_of(model)
    first = len(embedding) // 3
    device = "cpu" if embedding.device.type == "meta" else embedding.device  # of an offloaded embedding
    return torch.arange(first, first + count, device=device)
