"""Where the residual stream enters attention and MLP, and what stands between their outputs and it."""

import pytest
import torch
from torch import nn

import lightedit as le
from lightedit.lm import Place
from lightedit.lm.sublayers import find_sublayers
from tests.models import tiny_model, tiny_tokenizer

# model type -> (parallel, what the MLP's residual stream enters, norm behind the attention, norm behind the MLP)
EXPECTED = {
    "gpt2": (False, "ln_2", None, None),
    "gptj": (True, "ln_1", None, None),
    "gpt_neox": (True, "post_attention_layernorm", None, None),
    "gemma2": (False, "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": (False, "mlp.up_proj", "post_attention_layernorm", "post_feedforward_layernorm"),
    "cohere": (True, "input_layernorm", None, None),
    "granite": (False, "post_attention_layernorm", None, None),  # what is added is scaled
    "gemma4_text": (False, "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),
    "glm4": (False, "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", list(EXPECTED))
def test_sublayers_are_found_with_the_norms_around_them(architecture: str, dtype: torch.dtype) -> None:
    lm = le.LanguageModel(tiny_model(architecture, layers=2, dtype=dtype), tiny_tokenizer("bytelevel"))
    found = find_sublayers(lm)
    for layer, (attention, mlp) in enumerate(zip(found.attention, found.mlp, strict=True)):
        block = lm.blocks[layer]

        def module(path: str | None, block: nn.Module = block) -> nn.Module | None:
            return None if path is None else block.get_submodule(path)

        parallel, entry, behind_attention, behind_mlp = EXPECTED[architecture]
        assert found.parallel == parallel
        assert attention.entry is block and attention.matrix is lm.module(Place(layer, "attention_out"))
        assert attention.norm is module(behind_attention)
        assert mlp.entry is module(entry) and mlp.matrix is lm.module(Place(layer))
        assert mlp.norm is module(behind_mlp)
        assert mlp.exit is (mlp.matrix if behind_mlp is None else mlp.norm)
