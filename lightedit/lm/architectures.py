"""Where each architecture keeps its blocks and the matrices that are edited: one row a `model_type`."""

from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel


class UnsupportedModelError(ValueError):
    """The model's architecture, or the state of its weights, cannot be edited."""


@dataclass(frozen=True)
class Architecture:
    """Module paths of one architecture.

    Attributes:
        blocks: path from the causal language model to the list of transformer blocks.
        mlp_output: path inside a block to the MLP's second matrix, the one that is edited.
        attention_output: path inside a block to the attention's output matrix.
        mlp_norm: path inside a block to a norm between the MLP's output and the residual stream, if any.
        takes_position_ids: whether the model's forward accepts `position_ids`.
        packs: whether its attention can be exchanged (transformers' attention interface, no soft-capping), so that rows
            can be packed without padding.
    """

    blocks: str
    mlp_output: str
    attention_output: str
    mlp_norm: str | None = None
    takes_position_ids: bool = True
    packs: bool = True


_LLAMA = Architecture("model.layers", "mlp.down_proj", "self_attn.o_proj")
_POST_NORM = Architecture("model.layers", "mlp.down_proj", "self_attn.o_proj", mlp_norm="post_feedforward_layernorm")

ARCHITECTURES: dict[str, Architecture] = {
    "bloom": Architecture(
        "transformer.h", "mlp.dense_4h_to_h", "self_attention.dense", takes_position_ids=False, packs=False
    ),
    "falcon": Architecture("transformer.h", "mlp.dense_4h_to_h", "self_attention.dense", packs=False),
    "gemma2": replace(_POST_NORM, packs=False),
    "gemma3_text": _POST_NORM,
    "gpt2": Architecture("transformer.h", "mlp.c_proj", "attn.c_proj"),
    "gpt_neox": Architecture("gpt_neox.layers", "mlp.dense_4h_to_h", "attention.dense"),
    "gptj": Architecture("transformer.h", "mlp.fc_out", "attn.out_proj", packs=False),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo2": _POST_NORM,
    "opt": Architecture("model.decoder.layers", "fc2", "self_attn.out_proj"),
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Look up the row for `model`.

    Raises:
        UnsupportedModelError: the `model_type` has no row, or this variant normalises after its residual sum.
    """
    model_type = model.config.model_type
    if model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {model_type!r} is not known; known are {', '.join(sorted(ARCHITECTURES))}. "
            "A new one is one row in lightedit/lm/architectures.py."
        )
    if model_type == "opt" and not model.config.do_layer_norm_before:
        raise UnsupportedModelError(
            "this OPT variant (do_layer_norm_before=False, such as opt-350m) normalises after the residual sum, "
            "so a block's output is not linear in its MLP's output; use another OPT size."
        )
    return ARCHITECTURES[model_type]


def blocks_of(model: PreTrainedModel, architecture: Architecture) -> nn.ModuleList:
    """The transformer blocks of `model`, first to last."""
    blocks = model.get_submodule(architecture.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks
