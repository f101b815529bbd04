"""Module paths of the places of an architecture, and those that cannot be found but must be listed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightedit.errors import ArgumentError, UnsupportedModelError
from lightedit.lm.place import Name

Features = slice | Tensor
"""Output features of a module, as a slice or an index [n]. They are the same rows of its weight W [d_out, d_in]."""

Layout = Literal["stacked", "grouped"]


@dataclass(frozen=True)
class Architecture:
    """Module paths of one architecture.

    Attributes:
        embedding: path from the causal language model to its token embeddings.
        blocks: path from the causal language model to the list of transformer blocks.
        paths: name of a place -> path inside a block to the module of its matrix. Places with equal paths share a
            matrix.
        layout: order of the output features of a shared matrix. "stacked": all of q, then k, then v (or the gate, then
            mlp_in). "grouped": for each group of query heads, these heads, then one head of k and one of v.
        mlp_norm: path inside a block to a norm between the MLP's output and the residual stream, if any.
        block_norm: path inside a block to a norm of the sum of both, as at the end of BERT's blocks, if any.
        takes_position_ids: whether the model's forward accepts `position_ids`.
        supports_packing: whether rows can be packed without padding. This needs transformers' attention interface and
            no soft-capping of attention logits.
    """

    embedding: str
    blocks: str
    paths: Mapping[Name, str] = field(hash=False)
    layout: Layout = "stacked"
    mlp_norm: str | None = None
    block_norm: str | None = None
    takes_position_ids: bool = True
    supports_packing: bool = True

    @property
    def names(self) -> tuple[Name, ...]:
        """The names that a place can have in this architecture."""
        attention: tuple[Name, ...] = ("attention",) if {"q", "attention_out"} <= self.paths.keys() else ()
        return ("embedding", *self.paths, *attention, "block")


def _paths(attention: str, qkv: str, out: str, mlp_in: str, mlp: str, gate: str | None = None) -> dict[Name, str]:
    """Paths inside a block; `qkv` is the name of the matrix that q, k and v share."""
    shared = f"{attention}.{qkv}"
    paths: dict[Name, str] = {"q": shared, "k": shared, "v": shared, "attention_out": f"{attention}.{out}"}
    return paths | ({"mlp_gate": gate} if gate else {}) | {"mlp_in": mlp_in, "mlp": mlp}


_GROUPED = _paths("attention", "query_key_value", "dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_BLOOM = Architecture(
    "transformer.word_embeddings",
    "transformer.h",
    {name: path.replace("attention.", "self_attention.") for name, path in _GROUPED.items()},
    layout="grouped",
    supports_packing=False,
)

# Types whose places cannot be told from names and shapes: one matrix holds q, k and v.
ARCHITECTURES: dict[str, Architecture] = {
    "bloom": replace(_BLOOM, takes_position_ids=False),
    "falcon": _BLOOM,
    "gpt2": Architecture(
        "transformer.wte", "transformer.h", _paths("attn", "c_attn", "c_proj", "mlp.c_fc", "mlp.c_proj")
    ),
    "gpt_neox": Architecture("gpt_neox.embed_in", "gpt_neox.layers", _GROUPED, layout="grouped"),
    "phi3": Architecture(
        "model.embed_tokens",
        "model.layers",
        _paths("self_attn", "qkv_proj", "o_proj", "mlp.gate_up_proj", "mlp.down_proj", gate="mlp.gate_up_proj"),
    ),
}


def register_architecture(model_type: str, architecture: Architecture) -> None:
    """Say where the places of a model type are, in place of what `find_architecture` would find.

    A forward pass proves the paths when a model of this type is loaded.

    Args:
        model_type: `model_type` of the model's configuration.
        architecture: its module paths.

    Raises:
        ArgumentError: there is no path of the place "mlp".
    """
    if "mlp" not in architecture.paths:
        raise ArgumentError(f"the architecture of {model_type!r} has no path of 'mlp', the MLP's second matrix")
    ARCHITECTURES[model_type] = architecture


def blocks_of(model: PreTrainedModel, architecture: Architecture) -> nn.ModuleList:
    """The transformer blocks of `model`, first to last.

    Raises:
        UnsupportedModelError: the architecture's path leads to no list of modules.
    """
    try:
        blocks = model.get_submodule(architecture.blocks)
    except AttributeError:
        blocks = nn.Identity()
    if not isinstance(blocks, nn.ModuleList):
        raise UnsupportedModelError(
            f"{model.config.model_type} has no list of blocks at {architecture.blocks!r}, which its architecture names"
        )
    return blocks


def features_of(architecture: Architecture, config: Any, name: Name, d_out: int) -> Features | None:
    """The output features of a module that belong to the place `name`; None for all of them.

    They come in the model's own order, head by head.

    Args:
        architecture: the model's row.
        config: the text model's configuration.
        name: name of the place.
        d_out: number of output features of the module.
    """
    path = architecture.paths.get(name)
    if path is None or list(architecture.paths.values()).count(path) == 1:
        return None
    if name in ("mlp_gate", "mlp_in"):
        return slice(0, d_out // 2) if name == "mlp_gate" else slice(d_out // 2, d_out)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if architecture.layout == "stacked":
        queries = heads * head_dim
        others = (d_out - queries) // 2
        start, size = {"q": (0, queries), "k": (queries, others), "v": (queries + others, others)}[name]
        return slice(start, start + size)
    groups = _groups(config)
    rows = torch.arange(d_out).view(groups, heads // groups + 2, head_dim)
    chosen = {"q": rows[:, :-2], "k": rows[:, -2], "v": rows[:, -1]}[name].flatten()
    return slice(int(chosen[0]), int(chosen[-1]) + 1) if groups == 1 else chosen


def _groups(config: Any) -> int:
    """Number of groups of query heads. A group shares one head of keys and values; only Falcon has larger groups."""
    if getattr(config, "new_decoder_architecture", False):
        return int(config.num_kv_heads)
    return 1 if getattr(config, "multi_query", False) else int(config.num_attention_heads)
