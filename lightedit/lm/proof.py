"""Prove by short forward passes what an architecture claims, before anything is written with it.

A wrong claim would not fail: edits would go astray in silence. So a model becomes a `LanguageModel` only if its own
forward passes agree with the places found.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lightedit.errors import UnsupportedModelError
from lightedit.lm import hooks
from lightedit.lm.architectures import Architecture, blocks_of
from lightedit.lm.cache import PrefixCache, is_recurrent
from lightedit.lm.finder import embedding_of, probe_tokens, run
from lightedit.lm.packed import Span, packed_attention
from lightedit.ops import Head

_TOKENS = 3  # of the probe's rows
_FLOOR = 4  # roundings of a state that a difference of two states may show
_LOOSE = {torch.float64: 1e-5, torch.float32: 1e-3}  # share of the expected change that may be missed; else 0.03


@dataclass(frozen=True)
class Proof:
    """What the probe of one model measured.

    Attributes:
        mlp_scales: for each layer, the constant by which the MLP's output, after its norm if any, enters the block's
            output; 1 in most models.
        logit_scale: the constant by which the LM head's products are multiplied; 1 in most models.
        returns_tuple: whether blocks return (hidden, attention weights) rather than the hidden state alone.
    """

    mlp_scales: tuple[float, ...]
    logit_scale: float
    returns_tuple: bool


@torch.no_grad()
def packs(model: PreTrainedModel, architecture: Architecture, returns_tuple: bool) -> bool:
    """Prove that passes can start in the middle, and say whether rows can be packed.

    A whole pass over two rows is compared with one that starts at the middle block, from hidden states and a cache of
    the rows' prefixes, of 2 tokens and of 1. Then both rows' later tokens run packed, with the same prefixes. Packing
    needs transformers' attention interface, called with the sliding window if there is one, and with nothing that
    packed attention does not know, such as a soft-cap or sinks.

    Args:
        model: a causal language model in evaluation mode.
        architecture: its places.
        returns_tuple: whether blocks return tuples; see `Proof`.

    Raises:
        UnsupportedModelError: a pass from the middle gives other logits than a whole pass.
    """
    config = model.config.get_text_config(decoder=True)
    logits = partial(_logits, model, architecture)
    blocks = blocks_of(model, architecture)
    middle = len(blocks) // 2
    ids = probe_tokens(model, 7)
    rows = torch.stack([ids[:4], ids[[4, 5, 6, 6]]])
    positions = torch.arange(4, device=ids.device).expand(2, -1)
    later = positions[:, 2:] - torch.tensor([[0], [1]], device=ids.device)  # the later tokens' positions in their rows
    with hooks.capture({0: blocks[middle]}, 2, inputs=True) as states:
        whole = _of_later(logits(rows, positions, use_cache=False), later)
    parts = []
    for row, length in ((0, 2), (1, 1)):
        cache = DynamicCache(config=config)
        prefix = (rows[row : row + 1, :length], positions[:1, :length])
        logits(*prefix, use_cache=True, past_key_values=cache)
        parts.append(PrefixCache.of(cache, length))
    prefixes = PrefixCache.joined(parts, 2).rows(torch.tensor([0, 1]))
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]], device=ids.device)
    tokens = rows.gather(1, later)
    with hooks.skip_blocks(blocks[:middle], _of_later(states[0], later), returns_tuple):
        rest = logits(
            tokens,
            later,
            use_cache=True,
            past_key_values=prefixes.without(range(middle)),
            attention_mask=mask,
        )
    if not agree(rest, whole):
        raise UnsupportedModelError(
            f"{config.model_type}: a pass from block {middle} on, with hidden states and cached prefixes, gives other "
            "logits than a whole pass; expected blocks that are connected by the residual stream alone, and attention "
            "that follows the attention mask"
        )
    if not architecture.supports_packing or not architecture.takes_position_ids or is_recurrent(config):
        return False
    dtype = embedding_of(model).dtype
    spans = [
        Span.of(torch.ones(1, part.length + 2, dtype=torch.bool, device=ids.device), 2, part, dtype) for part in parts
    ]
    try:
        with packed_attention(model):
            packed = logits(tokens.view(1, -1), later.reshape(1, -1), use_cache=False, packed=spans)
    except (UnsupportedModelError, RuntimeError):  # this model takes no packed rows
        return False
    return agree(packed.view_as(whole), whole)


def _of_later(states: Tensor, later: Tensor) -> Tensor:
    return states.gather(1, later.to(states.device)[:, :, None].expand(-1, -1, states.shape[-1]))


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether logits differ by rounding only."""
    return bool((found - expected).norm() <= _LOOSE.get(expected.dtype, 0.05) * expected.norm())


@torch.no_grad()
def prove(model: PreTrainedModel, architecture: Architecture) -> Proof:
    """Add δ to the output of every block's MLP matrix and require the block's output to change accordingly.

    Two equal rows run together. In the second, δ is added at the last token in every block, and the block's output is
    put back to that of the first, so that one pass proves all blocks. The change must be s δ, or
    s (norm(m + δ) - norm(m)) where a norm follows the MLP's output m, with one constant s for each block.

    Args:
        model: a causal language model in evaluation mode.
        architecture: its places.

    Raises:
        UnsupportedModelError: a block's output does not follow its MLP's output, or the logits not the LM head.
    """
    probes = [
        BlockProbe(block, architecture, f"{model.config.model_type}: {architecture.blocks}.{layer}")
        for layer, block in enumerate(blocks_of(model, architecture))
    ]
    ids = probe_tokens(model, _TOKENS).expand(2, -1)
    head = model.get_output_embeddings()
    with ExitStack() as stack:
        for probe in probes:
            stack.enter_context(probe.attached())
        at = (torch.tensor([0]), torch.tensor([_TOKENS - 1]))
        entering = stack.enter_context(hooks.capture({0: head}, 2, at, inputs=True))
        logits = run(model, input_ids=ids, use_cache=False)[0, -1]
    constants = constants_of(model.config.get_text_config(decoder=True).to_dict())
    scales = tuple(probe.scale(constants) for probe in probes)
    return Proof(scales, _logit_scale(model, entering[0][0], logits, constants), probes[0].returns_tuple)


def _logits(model: PreTrainedModel, architecture: Architecture, ids: Tensor, positions: Tensor, **more: Any) -> Tensor:
    if architecture.takes_position_ids:
        more["position_ids"] = positions
    return run(model, input_ids=ids, **more)


class BlockProbe:
    """Adds δ to the MLP's output of one block in the second of two equal rows, and keeps what follows.

    Args:
        block: the block.
        architecture: the places of its model.
        where: its name in errors.
    """

    def __init__(self, block: nn.Module, architecture: Architecture, where: str) -> None:
        self.block, self.where = block, where
        self.path = architecture.paths["mlp"]
        missing = [path for path in architecture.paths.values() if path not in dict(block.named_modules())]
        if missing:
            raise UnsupportedModelError(f"{where} has no {', '.join(missing)}, which its architecture names")
        self.matrix = block.get_submodule(self.path)
        self.norm_path = architecture.mlp_norm
        self.norm = dict(block.named_modules()).get(self.norm_path) if self.norm_path else None
        # the states that follow the MLP's output are read where they are the sum, before a norm of it
        self.last_norm = block.get_submodule(architecture.block_norm) if architecture.block_norm else None
        self.passes = 0
        self.returns_tuple = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        port = hooks.Port(self.matrix, self.matrix, self.block)
        handles = [
            self.block.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.block.register_forward_hook(self._leave),
        ]
        if self.last_norm is not None:
            handles.append(self.last_norm.register_forward_hook(self._normalise))
        try:
            with hooks.changed(port, self._shift):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hidden = hooks.first_input(args, kwargs)
        self.made: Tensor | None = None

    def _shift(self, _: Tensor, output: Tensor) -> Tensor:
        # large, so that little of the change is lost when the block's output is rounded
        states = (self.hidden[0, -1].to(output.device), output[0, -1])
        size = 4 * torch.stack([state.float().square().mean().sqrt() for state in states]).max().clamp(min=1e-3)
        signs = torch.ones(output.shape[-1], device=output.device)
        signs[::3], signs[1::5] = -1.0, -0.5
        delta = (size.to(signs) * signs).to(output.dtype)
        self.made = output[:, -1].clone()
        output = output.clone()
        output[1, -1] += delta
        self.shifted = output[1, -1].clone()
        return output

    def _normalise(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.summed, self.normalised = args[0].clone(), output

    def _leave(self, _: nn.Module, args: Any, returned: Any) -> Any:
        self.passes += 1
        self.returns_tuple = isinstance(returned, tuple)
        hidden = hooks.hidden_of(returned)
        if hidden.shape != self.hidden.shape:
            raise UnsupportedModelError(
                f"{self.where} turns states {list(self.hidden.shape)} into {list(hidden.shape)}; expected one residual "
                "stream"
            )
        self.left = hidden.clone()
        if self.last_norm is not None:
            if not torch.equal(self.normalised, hidden):
                raise UnsupportedModelError(f"{self.where}: its output is not that of its last norm")
            self.left = self.summed
        same = hidden.clone()
        same[1] = hidden[0]
        return (same, *returned[1:]) if isinstance(returned, tuple) else same

    def scale(self, constants: Sequence[float]) -> float:
        """The constant s of this block; see `prove`."""
        if self.passes != 1 or self.made is None:
            raise UnsupportedModelError(
                f"{self.where} ran {self.passes} times in one forward pass, its {self.path} "
                f"{'not at all' if self.made is None else 'too'}; expected each once"
            )
        unchanged, shifted = self.made[1], self.shifted
        if self.norm is not None:
            unchanged, shifted = (self.norm(state[None, None])[0, 0] for state in (unchanged, shifted))
        expected = (shifted - unchanged).double()
        if len(expected) != self.left.shape[-1]:
            raise UnsupportedModelError(
                f"{self.where}.{self.path} has {len(expected)} outputs; expected as many as the residual stream, "
                f"{self.left.shape[-1]}"
            )
        change = (self.left[1] - self.left[0]).double()
        if not torch.isfinite(change).all():
            raise UnsupportedModelError(
                f"{self.where} gives NaN or infinity in {self.left.dtype}; load the model in another dtype, or check "
                "its weights"
            )
        elsewhere = change[:-1].norm()
        dtype = self.left.dtype
        floor = _FLOOR * torch.finfo(dtype).eps * self.left.double().norm()
        own = [p.item() for p in self.block.parameters() if p.numel() == 1 and p.device.type != "meta"]
        own += [b.item() for b in self.block.buffers() if b.numel() == 1 and b.device.type != "meta"]
        unsure = max(_LOOSE.get(dtype, 0.03), float(floor / expected.norm()))
        s = _constant(change[-1], expected, [*constants, *map(float, own)], unsure)
        missed = (change[-1] - s * expected).norm()
        if missed <= floor + _LOOSE.get(dtype, 0.03) * (s * expected).norm() and elsewhere <= floor and s:
            return s
        after = f"{self.norm_path} of it" if self.norm is not None else "it"
        raise UnsupportedModelError(
            f"{self.where}: what is added to the output of {self.path} does not reach the block's output: expected a "
            f"change proportional to {after}, but a share of {missed / change[-1].norm():.2g} of the change differs. "
            "A norm or gate after the residual sum, or after the MLP, cannot be edited through"
        )


def _constant(actual: Tensor, expected: Tensor, known: Iterable[float], unsure: float) -> float:
    """s of the best fit actual = s expected, as a known constant or 1 if one agrees up to the share `unsure`."""
    measured = float(actual @ expected / (expected @ expected)) if expected.any() else 1.0
    near = min([1.0, *known], key=lambda constant: abs(constant - measured))
    return next((s for s in (near, 1.0) if math.isclose(s, measured, rel_tol=unsure)), measured)


def constants_of(config: dict[str, Any]) -> list[float]:
    """The numbers of a configuration; a multiplier is usually one of them."""
    values = [v for value in config.values() for v in (value if isinstance(value, list | tuple) else [value])]
    return [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v]


def _logit_scale(model: PreTrainedModel, state: Tensor, logits: Tensor, constants: Sequence[float]) -> float:
    """The constant between the LM head's products and the logits."""
    head = model.get_output_embeddings()
    if head.weight.device.type == "meta":  # offloaded: its products cannot be computed here
        return 1.0
    softcap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    bias = getattr(head, "bias", None)
    state = state[None].to(head.weight)
    products = Head(head.weight, bias).logits(state).double()[0]
    logits = logits.to(products)
    known = [*constants, *(1 / constant for constant in constants)]  # Granite divides
    s = 1.0 if softcap else _constant(logits, products, known, _LOOSE.get(head.weight.dtype, 0.03))
    found = Head(head.weight, bias, softcap, s).logits(state).double()[0]
    if (found - logits).norm() > 0.03 * logits.norm():
        raise UnsupportedModelError(
            f"{model.config.model_type}: the logits are not those of the LM head {type(head).__name__} times a constant"
        )
    return s
