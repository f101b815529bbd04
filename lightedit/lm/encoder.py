"""The places of a classifier: an encoder such as BERT with a classification head, found and proven at loading."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightedit.errors import UnsupportedModelError
from lightedit.lm import hooks
from lightedit.lm.anatomy import Anatomy
from lightedit.lm.architectures import Architecture, blocks_of
from lightedit.lm.batch import pad
from lightedit.lm.finder import is_norm, probe_tokens, run, structure_of
from lightedit.lm.place import Name
from lightedit.lm.proof import BlockProbe, Proof, agree, constants_of
from lightedit.ops import Head

# paths of q, k, v and the output matrix inside the blocks of encoders: BERT and its kin, DistilBERT, MPNet
_ATTENTION = (
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
    ("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"),
)
_NAMES: tuple[Name, ...] = ("q", "k", "v", "attention_out", "mlp_gate", "mlp_in", "mlp")


class EncoderAnatomy(Anatomy):
    """The places of an encoder with a classification head.

    Args:
        model: a model for sequence classification, in evaluation mode.

    Raises:
        UnsupportedModelError: it has not one class of several for a text; its places are not found; or a probe finds
            that they are not what they should be.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        _check_labels(model)
        self._model = model
        self.architecture = encoder_architecture(model)
        self.blocks = blocks_of(model, self.architecture)
        self._head = _find_head(model)
        self.proof = prove_classifier(model, self.architecture, self._head)

    def head_module(self) -> nn.Module:
        return self._head

    def head(self) -> Head:
        """The last matrix of the classification head, [classes, d]."""
        bias = self._head.bias
        return Head(self._head.weight.data, None if bias is None else bias.data)


def encoder_architecture(model: PreTrainedModel) -> Architecture:
    """Find the places of an encoder by structure and names, and the norm at the end of its blocks by a forward pass.

    Raises:
        UnsupportedModelError: no blocks are found, or a block has not exactly one MLP.
    """
    found = structure_of(model)
    blocks = blocks_of(model, found)
    paths: dict[Name, str] = dict(found.paths)
    for each in _ATTENTION:
        if all(isinstance(dict(block.named_modules()).get(path), nn.Linear) for block in blocks for path in each):
            paths |= zip(("q", "k", "v", "attention_out"), each, strict=True)
    ordered: Mapping[Name, str] = {name: paths[name] for name in _NAMES if name in paths}
    return replace(
        found,
        paths=ordered,
        takes_position_ids=False,
        supports_packing=False,
        block_norm=_norm_at_the_end(model, blocks),
    )


def _check_labels(model: PreTrainedModel) -> None:
    config: Any = model.config
    if config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
        found = config.problem_type or f"{config.num_labels} label"
        raise UnsupportedModelError(
            f"{config.model_type} with {found}; expected a classifier that gives a text one of several classes "
            "(two labels for yes and no)"
        )


@torch.no_grad()
def _norm_at_the_end(model: PreTrainedModel, blocks: nn.ModuleList) -> str | None:
    """The path inside a block to the norm whose output is the block's output; None if blocks end in a sum."""
    ends: list[str | None] = []
    with ExitStack() as stack:
        each = []
        for block in blocks:
            norms = {name: part for name, part in block.named_modules() if is_norm(part)}
            outputs = {name: stack.enter_context(hooks.returned_by(part)) for name, part in norms.items()}
            each.append((outputs, stack.enter_context(hooks.returned_by(block))))
        run(model, input_ids=probe_tokens(model, 3)[None])
    for outputs, returned in each:
        left = hooks.hidden_of(returned[-1])
        ends.append(next((name for name, made in outputs.items() if made and torch.equal(made[-1], left)), None))
    if len(set(ends)) > 1:
        raise UnsupportedModelError(
            f"{model.config.model_type} has blocks of several kinds: they end in {sorted(set(map(str, ends)))}; "
            "expected equal blocks"
        )
    return ends[0]


@torch.no_grad()
def _find_head(model: PreTrainedModel) -> nn.Linear:
    """The linear map whose output are the logits of the classes."""
    config: Any = model.config
    labels = int(config.num_labels)
    maps = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == labels]
    with ExitStack() as stack:
        returned = [stack.enter_context(hooks.returned_by(part)) for part in maps]
        logits = run(model, input_ids=probe_tokens(model, 3)[None])
    for part, outputs in zip(maps, returned, strict=True):
        if outputs and outputs[-1].shape == logits.shape and torch.equal(outputs[-1], logits):
            return part
    raise UnsupportedModelError(
        f"{model.config.model_type}: no linear map gives the logits of its {labels} classes, one row for each text; "
        "expected an encoder such as BERT, RoBERTa or DistilBERT with a classification head"
    )


@torch.no_grad()
def prove_classifier(model: PreTrainedModel, architecture: Architecture, head: nn.Linear) -> Proof:
    """Prove the places of a classifier by short forward passes.

    What is added to the output of a block's MLP must reach the sum at the block's end. The logits must be those of the
    head; those of a padded row, those of the row alone; and those of a pass that starts at the middle block with hidden
    states, those of a whole pass.

    Raises:
        UnsupportedModelError: says which of it does not hold.
    """
    kind = model.config.model_type
    blocks = blocks_of(model, architecture)
    probes = [BlockProbe(block, architecture, f"{kind}: {architecture.blocks}.{i}") for i, block in enumerate(blocks)]
    ids = probe_tokens(model, 7)
    with ExitStack() as stack:
        for probe in probes:
            stack.enter_context(probe.attached())
        run(model, input_ids=ids[:3].expand(2, -1))
    constants = constants_of(model.config.to_dict())
    proof = Proof(tuple(probe.scale(constants) for probe in probes), 1.0, probes[0].returns_tuple)

    rows = pad([ids[:4].tolist(), ids[4:].tolist()], int(model.config.pad_token_id or 0)).to(ids.device)
    masked = {"input_ids": rows.ids, "attention_mask": rows.mask.long()}
    middle = len(blocks) // 2
    with (
        hooks.capture({0: blocks[middle]}, 2, inputs=True) as entering,
        hooks.capture({0: head}, 2, inputs=True) as read,
    ):
        whole = run(model, **masked)
    alone = torch.cat([run(model, input_ids=ids[None, :4]), run(model, input_ids=ids[None, 4:])])
    with hooks.skip_blocks(blocks[:middle], entering[0], proof.returns_tuple):
        rest = run(model, **masked)
    products = Head(head.weight, head.bias).logits(read[0][:, 0].to(head.weight))
    found: dict[str, Tensor] = {
        "a row that is padded on the right, and one that is not,": alone,
        f"a pass from block {middle} on, with hidden states, and a whole pass": rest,
        "its last matrix and its head": products.to(whole),
    }
    for what, logits in found.items():
        if not agree(logits, whole):
            raise UnsupportedModelError(f"{kind}: {what} give different logits; expected the same")
    return proof
