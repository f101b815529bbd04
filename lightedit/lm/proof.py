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
def continues(model: PreTrainedModel, architecture: Architecture, returns_tuple: bool) -> None:
    """Require that a pass started in the middle, from hidden states and a prefix cache, gives a whole pass's logits.

    Raises:
        UnsupportedModelError: it does not, since blocks take more from earlier blocks than the residual stream.
    """
    blocks = blocks_of(model, architecture)
    ids = probe_tokens(model, 4)
    logits = partial(_logits, model, architecture)
    positions = torch.arange(4, device=ids.device)[None]
    middle = len(blocks) // 2
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    logits(ids[None, :2], positions[:, :2], use_cache=True, past_key_values=cache)
    prefix = PrefixCache.of(cache, 2).without(range(middle))
    with hooks.capture({0: blocks[middle]}, 1, inputs=True) as states:
        whole = logits(ids[None], positions, use_cache=False)[0, -1]
    mask = torch.ones(1, 4, dtype=torch.long, device=ids.device)
    with hooks.skip_blocks(blocks[:middle], states[0][:, 2:], returns_tuple):
        rest = logits(ids[None, 2:], positions[:, 2:], use_cache=True, past_key_values=prefix, attention_mask=mask)[
            0, -1
        ]
    if (rest - whole).norm() > _LOOSE.get(whole.dtype, 0.05) * whole.norm():
        raise UnsupportedModelError(
            f"{config.model_type}: a pass from block {middle} on, with hidden states and a cache of the tokens before, "
            "gives other logits than a whole pass; expected blocks that are connected by the residual stream alone"
        )


@torch.no_grad()
def packs(model: PreTrainedModel, architecture: Architecture) -> bool:
    """Whether packed rows of different lengths give the logits that each row gives alone.

    The attention must call transformers' attention interface, with its sliding window if it has one, and with nothing
    that packed attention does not know, such as a soft-cap or sinks.
    """
    config = model.config.get_text_config(decoder=True)
    if is_recurrent(config) or not architecture.takes_position_ids:
        return False
    ids = probe_tokens(model, 5)
    positions = torch.tensor([0, 1, 2, 0, 1], device=ids.device)
    logits = partial(_logits, model, architecture)
    padded = torch.stack([ids[:3], ids[[3, 4, 4]]])  # what follows a token does not reach it
    alone = logits(padded, positions[None, :3].expand(2, -1), use_cache=False).flatten(0, 1)[:5]
    dtype = embedding_of(model).dtype
    spans = [Span.of(torch.ones(1, n, dtype=torch.bool, device=ids.device), n, None, dtype) for n in (3, 2)]
    try:
        with packed_attention(model):
            together = logits(ids[None], positions[None], use_cache=False, packed=spans)[0]
    except (UnsupportedModelError, RuntimeError):  # this model takes no packed rows
        return False
    return bool((together - alone).norm() <= _LOOSE.get(alone.dtype, 0.03) * alone.norm())


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
        _BlockProbe(block, architecture, f"{model.config.model_type}: {architecture.blocks}.{layer}")
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
    constants = _constants(model.config.get_text_config(decoder=True).to_dict())
    scales = tuple(probe.scale(constants) for probe in probes)
    return Proof(scales, _logit_scale(model, entering[0][0], logits, constants), probes[0].returns_tuple)


def _logits(model: PreTrainedModel, architecture: Architecture, ids: Tensor, positions: Tensor, **more: Any) -> Tensor:
    if architecture.takes_position_ids:
        more["position_ids"] = positions
    return run(model, input_ids=ids, **more)


class _BlockProbe:
    """Adds δ to the MLP's output of one block in the second of two equal rows, and keeps what follows."""

    def __init__(self, block: nn.Module, architecture: Architecture, where: str) -> None:
        self.block, self.where = block, where
        self.path = architecture.paths["mlp"]
        missing = [path for path in architecture.paths.values() if path not in dict(block.named_modules())]
        if missing:
            raise UnsupportedModelError(f"{where} has no {', '.join(missing)}, which its architecture names")
        self.matrix = block.get_submodule(self.path)
        self.norm_path = architecture.mlp_norm
        self.norm = dict(block.named_modules()).get(self.norm_path) if self.norm_path else None
        self.passes = 0
        self.returns_tuple = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        port = hooks.Port(self.matrix, self.matrix, self.block)
        handles = [
            self.block.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.block.register_forward_hook(self._leave),
        ]
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
        size = self.hidden[0, -1].float().square().mean().sqrt().clamp(min=1e-3)
        signs = torch.ones(output.shape[-1], device=output.device)
        signs[::3], signs[1::5] = -1.0, -0.5
        delta = (size.to(signs) * signs).to(output.dtype)
        self.made = output[:, -1].clone()
        output = output.clone()
        output[1, -1] += delta
        self.shifted = output[1, -1].clone()
        return output

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
        elsewhere = change[:-1].norm()
        dtype = self.left.dtype
        floor = _FLOOR * torch.finfo(dtype).eps * self.left.double().norm()
        own = [p.item() for p in self.block.parameters() if p.numel() == 1 and p.device.type != "meta"]
        own += [b.item() for b in self.block.buffers() if b.numel() == 1 and b.device.type != "meta"]
        s = _constant(change[-1], expected, [1.0, *constants, *map(float, own)], dtype)
        missed = (change[-1] - s * expected).norm()
        if missed <= floor + _LOOSE.get(dtype, 0.03) * (s * expected).norm() and elsewhere <= floor and s:
            return s
        after = f"{self.norm_path} of it" if self.norm is not None else "it"
        raise UnsupportedModelError(
            f"{self.where}: what is added to the output of {self.path} does not reach the block's output: expected a "
            f"change proportional to {after}, but a share of {missed / change[-1].norm():.2g} of the change differs. "
            "A norm or gate after the residual sum, or after the MLP, cannot be edited through"
        )


def _constant(actual: Tensor, expected: Tensor, known: Iterable[float], dtype: torch.dtype) -> float:
    """s of the best fit actual = s expected, as a known constant if one agrees with it."""
    measured = float(actual @ expected / (expected @ expected)) if expected.any() else 1.0
    near = min(known, key=lambda constant: abs(constant - measured))
    return near if math.isclose(near, measured, rel_tol=_LOOSE.get(dtype, 0.03)) else measured


def _constants(config: dict[str, Any]) -> list[float]:
    """The numbers of a configuration and their inverses; one of them is usually a multiplier."""
    values = [v for value in config.values() for v in (value if isinstance(value, list | tuple) else [value])]
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v]
    return [*numbers, *(1 / number for number in numbers)]


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
    s = 1.0 if softcap else _constant(logits, products, [1.0, *constants], head.weight.dtype)
    found = Head(head.weight, bias, softcap, s).logits(state).double()[0]
    if (found - logits).norm() > 0.03 * logits.norm():
        raise UnsupportedModelError(
            f"{model.config.model_type}: the logits are not those of the LM head {type(head).__name__} times a constant"
        )
    return s
