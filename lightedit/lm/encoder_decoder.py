"""The places of an encoder-decoder of T5's kind, proven at loading.

Layers are numbered through: those of the encoder first, then those of the decoder. With E encoder blocks, layer E is
the first block of the decoder.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lightedit.errors import UnsupportedModelError
from lightedit.lm import hooks
from lightedit.lm.anatomy import Anatomy
from lightedit.lm.architectures import Architecture, Features
from lightedit.lm.batch import pad
from lightedit.lm.finder import probe_tokens, run
from lightedit.lm.place import Name, Place
from lightedit.lm.proof import BlockProbe, Proof, agree, constants_of
from lightedit.ops import Head


def _architecture(side: str, mlp: int, gated: bool) -> Architecture:
    """T5's encoder or decoder, whose MLP is sublayer number `mlp` of each block."""
    attention, dense = "layer.0.SelfAttention", f"layer.{mlp}.DenseReluDense"
    q_k_v: dict[Name, str] = {"q": f"{attention}.q", "k": f"{attention}.k", "v": f"{attention}.v"}
    first: dict[Name, str] = {"mlp_gate": f"{dense}.wi_0", "mlp_in": f"{dense}.wi_1"}
    if not gated:
        first = {"mlp_in": f"{dense}.wi"}
    paths: dict[Name, str] = {**q_k_v, "attention_out": f"{attention}.o", **first, "mlp": f"{dense}.wo"}
    return Architecture(
        f"{side}.embed_tokens", f"{side}.block", paths, takes_position_ids=False, supports_packing=False
    )


class EncoderDecoderAnatomy(Anatomy):
    """The places of an encoder-decoder of T5's kind: self-attention and MLP of each block.

    The cross-attention of the decoder has no places. The place "embedding" is that of the encoder; its matrix is mostly
    shared with the decoder.

    Args:
        model: a `T5ForConditionalGeneration` or its kin, in evaluation mode.

    Raises:
        UnsupportedModelError: its blocks are not T5's, or a probe finds that they are not what they should be.

    Attributes:
        encoder_layers: E, the number of encoder blocks.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        stacks = [_stack(model, side) for side in ("encoder", "decoder")]
        gated = hasattr(dict(stacks[0][0].named_modules()).get("layer.1.DenseReluDense"), "wi_0")
        self._sides = (_architecture("encoder", 1, gated), _architecture("decoder", 2, gated))
        self.architecture = self._sides[0]
        self.encoder_layers = len(stacks[0])
        self.blocks = nn.ModuleList([block for stack in stacks for block in stack])
        self.proof = self._prove()

    def located(self, layer: int) -> tuple[str, Mapping[Name, str]]:
        side = int(layer >= self.encoder_layers)
        architecture = self._sides[side]
        return f"{architecture.blocks}.{layer - side * self.encoder_layers}", architecture.paths

    def features(self, place: Place) -> Features | None:
        return None  # no matrix is shared

    def head(self) -> Head:
        """The LM head behind the decoder, [vocabulary, d]."""
        module: Any = self.head_module()
        return Head(module.weight.data, None if module.bias is None else module.bias.data)

    @torch.no_grad()
    def _prove(self) -> Proof:
        """Prove by short forward passes that MLPs reach their blocks' outputs, and that the head gives the logits.

        The logits of a padded row must be those of the row alone.
        """
        model, kind = self._model, self._model.config.model_type
        probes = [
            BlockProbe(block, self._sides[layer >= self.encoder_layers], f"{kind}: {self.located(layer)[0]}")
            for layer, block in enumerate(self.blocks)
        ]
        ids = probe_tokens(model, 9)
        with ExitStack() as stack:
            for probe in probes:
                stack.enter_context(probe.attached())
            run(model, input_ids=ids[:3].expand(2, -1), decoder_input_ids=ids[3:6].expand(2, -1), use_cache=False)
        constants = constants_of(model.config.to_dict())
        scales = tuple(probe.scale(constants) for probe in probes)

        rows = pad([ids[:4].tolist(), ids[4:7].tolist()], int(model.config.pad_token_id or 0)).to(ids.device)
        said = ids[7:]
        with hooks.capture({0: self.head_module()}, 2, inputs=True) as read:
            whole = run(
                model,
                input_ids=rows.ids,
                attention_mask=rows.mask.long(),
                decoder_input_ids=said.expand(2, -1),
                use_cache=False,
            )
        alone = [run(model, input_ids=row[None], decoder_input_ids=said[None]) for row in (ids[:4], ids[4:7])]
        head = self.head()
        products = head.logits(read[0].flatten(0, 1).to(head.weight)).view_as(whole).to(whole)
        for what, logits in (("a padded row and the row alone", torch.cat(alone)), ("head and LM head", products)):
            if not agree(logits, whole):
                raise UnsupportedModelError(f"{kind}: {what} give different logits; expected the same")
        return Proof(scales, 1.0, probes[0].returns_tuple)


def _stack(model: PreTrainedModel, side: str) -> nn.ModuleList:
    try:
        blocks = model.get_submodule(f"{side}.block")
        for part in ("SelfAttention.q", "SelfAttention.o"):
            model.get_submodule(f"{side}.block.0.layer.0.{part}")
        model.get_submodule(f"{side}.block.0.layer.{1 if side == 'encoder' else 2}.DenseReluDense.wo")
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{model.config.model_type} is an encoder-decoder whose {side} is not T5's ({error}); expected T5 or mT5"
        ) from error
    assert isinstance(blocks, nn.ModuleList)
    return blocks
