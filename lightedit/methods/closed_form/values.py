"""Step 1: find, for each fact, the activation at the subject's last token that makes the model state the target.

Weights stay frozen; one vector δ per fact is trained with Adam (Meng et al., 2022, arXiv 2202.05262, eq. 4; Meng et
al., 2023, arXiv 2210.07229, eq. 16, with the published code's loss). What cannot depend on δ is computed once: the
tokens before the subject's last one live on as a prefix cache, and the blocks up to the edited layer as the captured
output of the last of them. The LM head is applied at target positions only. All of this is exact.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from lightedit.data.prompts import FactPrompts, Row
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import PASS_COST, Batch, pad, rectangles
from lightedit.lm.cache import PrefixCache
from lightedit.lm.hooks import capture, stop_after
from lightedit.lm.packed import Span
from lightedit.lm.prefix import prefix_cache
from lightedit.methods.closed_form.stopping import Evaluated, KLBelow, MostProbable
from lightedit.ops import target_nll_kl
from lightedit.progress import Report

Site = Literal["block", "mlp", "attention+mlp"]


@dataclass(frozen=True)
class ValueSettings:
    """Settings of the value optimisation.

    Attributes:
        lr: Adam's learning rate.
        steps: evaluations of the loss at most; the last one takes no step, as in the published code.
        clamp_norm_factor: after each step, ||δ|| is kept within this times ||h0||, h0 the unedited activation.
        kl_factor: weight of KL(edited || unedited) at the subject's last token of "{subject} is a".
        weight_decay: weight of ||δ|| / ||h0||² (the norm of δ is not squared).
        loss_threshold: a fact is done once its loss is below this.
        stopping: a further rule that ends a fact; none by default.
    """

    lr: float = 0.5
    steps: int = 25
    clamp_norm_factor: float = 0.75
    kl_factor: float = 0.0625
    weight_decay: float = 0.5
    loss_threshold: float = 0.05
    stopping: MostProbable | KLBelow | None = None

    def __post_init__(self) -> None:
        if not (self.lr > 0 and self.steps >= 1 and self.clamp_norm_factor > 0):  # which NaN fails, too
            raise ValueError(f"lr, steps and clamp_norm_factor must be positive, got {self}")
        if not all(value >= 0 for value in (self.kl_factor, self.weight_decay, self.loss_threshold)):
            raise ValueError(f"kl_factor, weight_decay and loss_threshold must not be negative, got {self}")


@dataclass(frozen=True)
class Values:
    """Outcome of step 1 for B facts.

    Attributes:
        targets: v = h0 + δ at the site, [B, d]; [B, 2 d] for "attention+mlp", in that order.
        initial: h0, the site's activation before the edit, of the same shape.
        steps: Adam steps taken, [B].
        losses: each fact's last evaluated loss, [B].
    """

    targets: Tensor
    initial: Tensor
    steps: Tensor
    losses: Tensor


@dataclass
class TokenCount:
    """Suffix tokens that went through the blocks above the edited one, summed over steps."""

    real: int = 0
    computed: int = 0

    def __iadd__(self, other: "TokenCount") -> "TokenCount":
        self.real += other.real
        self.computed += other.computed
        return self

    @property
    def padding(self) -> float:
        """Share of computed tokens that were padding."""
        return 1 - self.real / self.computed if self.computed else 0.0


@dataclass
class _Rows:
    """Rows of one rectangle: the suffix from the subject's last token on, and what precedes and underlies it."""

    batch: Batch  # ids and positions [rows, suffix], mask [rows, prefix + suffix]
    cache: PrefixCache | None
    hidden: Tensor  # output of the edited block, [rows, suffix, d]; its input where δ is added inside of it
    mlp: Tensor | None  # MLP output at the subject's last token, [rows, d], where a norm follows it
    fact: Tensor  # index of each row's fact, [rows]
    context: Tensor  # index of each row's context in its fact, [rows]
    at: tuple[Tensor, Tensor]  # rows and positions where the head is read, [n] each: m targets, then the KL term's
    targets: Tensor  # target ids, [m]
    weight: Tensor  # weight of each read position in its fact's loss, [n]

    def keep(self, rows: Tensor) -> "_Rows":
        """The sub-rectangle of `rows`, a boolean [rows]."""
        index = rows.nonzero().squeeze(1)
        read = rows[self.at[0]]
        renumber = rows.cumsum(0) - 1

        def kept(tensor: Tensor) -> Tensor:
            return tensor[index.to(tensor.device)]

        return _Rows(
            Batch(kept(self.batch.ids), kept(self.batch.mask), kept(self.batch.positions)),
            None if self.cache is None else self.cache.rows(index),
            kept(self.hidden),
            None if self.mlp is None else kept(self.mlp),
            kept(self.fact),
            kept(self.context),
            (renumber[self.at[0][read]], self.at[1][read]),
            self.targets[read[: len(self.targets)].to(self.targets.device)],
            self.weight[read],
        )


class ValueOptimization:
    """The joint optimisation of δ for several facts; every fact's trajectory is that of its own separate loop.

    Losses are summed over facts and Adam is elementwise, so facts do not influence one another. A fact that is done
    keeps its δ and its rows leave the batch.

    That is so up to rounding. Adam's first step of a component is lr g / (|g| + 1e-8), as large for a small gradient as
    for a large one; where a component's gradient is nothing but rounding (seen once in some hundred facts), the order
    of a sum decides its step, in the published loop as here, and δ differs by a percent. In float64 it does not.

    Args:
        lm: the language model.
        prompts: the facts' token rows.
        layer: the block at or in which δ is added.
        site: "block" adds δ to the block's output, "mlp" to the output of its MLP, "attention+mlp" one δ each to the
            outputs of its attention and of its MLP.
        settings: see `ValueSettings`.
        max_tokens: suffix tokens of one forward and backward pass at most; bounds memory.

    Attributes:
        delta: the parameter, [facts, d], float32 or better; [facts, 2 d] for two sites.
        active: which facts are still optimised, [facts].
        tokens: how many suffix tokens were computed so far.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[FactPrompts],
        layer: int,
        site: Site,
        settings: ValueSettings,
        max_tokens: int = 1024,
    ) -> None:
        self.lm, self.prompts, self.layer, self.site, self.settings = lm, prompts, layer, site, settings
        self.tokens = TokenCount()
        rows = [
            (index, context, row)
            for index, fact in enumerate(prompts)
            for context, row in enumerate((*fact.rows, fact.subject))
        ]
        initial: dict[int, Tensor] = {}
        self._rows = []
        self._max_tokens = max_tokens
        prefixes = prefix_cache(lm, [row.ids[: row.lookup] for _, _, row in rows])
        pass_cost = 0 if lm.architecture.packs else PASS_COST  # packed rectangles share a pass, and need no padding
        for group in rectangles([len(row.ids) - row.lookup for _, _, row in rows], max_tokens, pass_cost):
            captured, activations = self._capture([rows[i] for i in group], torch.tensor(group), *prefixes)
            self._rows.append(captured)
            for i, activation in zip(group, activations, strict=True):
                index, context, _ = rows[i]
                if context in prompts[index].bare:
                    share = activation / len(prompts[index].bare)
                    initial[index] = initial[index] + share if index in initial else share
        self.initial = torch.stack([initial[index] for index in range(len(prompts))])
        self._sites = 2 if site == "attention+mlp" else 1
        device = self.initial.device
        self.delta = nn.Parameter(torch.zeros_like(self.initial))
        self.active = torch.ones(len(prompts), dtype=torch.bool, device=device)
        self._final = torch.zeros_like(self.initial)
        self._steps = torch.zeros(len(prompts), dtype=torch.long, device=device)
        self._losses = torch.full((len(prompts),), torch.nan, device=device, dtype=self.initial.dtype)
        self._reference: dict[int, Tensor] = {}  # fact -> unedited log-probabilities of the KL term, [vocabulary]
        self._no_reference = torch.empty(0, len(lm.head.weight), dtype=self.initial.dtype, device=lm.head.weight.device)
        if settings.steps == 1:
            self.active[:] = False
        contexts = max(len(fact.rows) for fact in prompts)
        self._tokens = torch.zeros(len(prompts), contexts, dtype=torch.long, device=device)
        for index, fact in enumerate(prompts):
            self._tokens[index, : len(fact.rows)] = torch.tensor([len(row.targets) for row in fact.rows])
        self._times = torch.zeros(len(prompts), dtype=torch.long, device=device)
        self._nll_factor = torch.ones_like(self._losses)

    @property
    def _first_block(self) -> int:
        """The first block that runs again at every step."""
        return self.layer if self.site == "attention+mlp" else self.layer + 1

    @property
    def done(self) -> bool:
        """Whether no fact is left to optimise."""
        return not bool(self.active.any())

    @property
    def progress(self) -> Tensor:
        """The share of its steps that each fact has behind it, [facts]; 1 for finished facts."""
        share = self._steps / max(1, self.settings.steps - 1)
        return torch.where(self.active, share, torch.ones_like(share))

    def make_optimizer(self) -> torch.optim.Adam:
        """Adam over δ, as published."""
        return torch.optim.Adam([self.delta], lr=self.settings.lr)

    def backward(self) -> Tensor:
        """Evaluate every active fact's loss and leave the gradients in `delta.grad`.

        Facts whose loss is below the threshold are finished with the δ they have.

        Returns:
            The last known loss of every fact, [facts].

        Raises:
            FloatingPointError: a loss is NaN or infinite; names the fact.
        """
        self.delta.grad = None
        losses = self._weight_decay()
        losses[self.active].sum().backward()
        losses = losses.detach()
        kl, right = torch.zeros_like(losses), torch.zeros_like(self._tokens)
        for rows_of_pass in self._passes():
            nll_of_pass, kl_of_pass = self._loss(rows_of_pass, right)
            partial = self._nll_factor * nll_of_pass + kl_of_pass
            partial.sum().backward()
            losses += partial.detach()
            kl += kl_of_pass.detach()
        bad = (~torch.isfinite(losses) & self.active).nonzero().squeeze(1).tolist()
        if bad:
            fact = self.prompts[bad[0]].fact
            raise FloatingPointError(
                f"the loss of fact {fact.text!r} -> {fact.target_new!r} is {losses[bad[0]].item()} after "
                f"{int(self._steps[bad[0]])} steps; lower lr ({self.settings.lr}), or load the model in float32"
            )
        self._losses = torch.where(self.active, losses, self._losses)
        done = self._losses < self.settings.loss_threshold
        if (rule := self.settings.stopping) is not None:
            step = Evaluated(kl, right, self._tokens, self._times)
            self._times += rule.reached(step)
            done |= rule.done(step)
            self._nll_factor = rule.nll_factor(step)
        self._finish(self.active & done)
        return self._losses

    @torch.no_grad()
    def after_step(self) -> None:
        """Project δ back into its ball after an optimizer step, and finish facts that have no step left."""
        norm, initial = self._norms(self.delta), self._norms(self.initial)
        bound = self.settings.clamp_norm_factor * initial
        shrink = torch.where(norm > bound, bound / norm, torch.ones_like(norm))
        self.delta.mul_(shrink.repeat_interleave(self.delta.shape[1] // self._sites, dim=1))
        self._steps += self.active
        self._finish(self.active & (self._steps >= self.settings.steps - 1))

    def values(self) -> Values:
        """The targets found so far."""
        delta = torch.where(self.active[:, None], self.delta.detach(), self._final)
        return Values(self.initial + delta, self.initial, self._steps.clone(), self._losses.clone())

    @torch.no_grad()
    def _finish(self, facts: Tensor) -> None:
        if not facts.any():
            return
        self._final[facts] = self.delta[facts]
        self.active &= ~facts
        kept = []
        for rows in self._rows:
            active = self.active[rows.fact]
            if active.any():
                kept.append(rows if active.all() else rows.keep(active))
        self._rows = kept

    def _norms(self, vectors: Tensor) -> Tensor:
        """Norm of each site's part of [facts, sites * d] vectors, [facts, sites]."""
        return vectors.unflatten(1, (self._sites, -1)).norm(dim=2)

    def _weight_decay(self) -> Tensor:
        return self.settings.weight_decay * (self._norms(self.delta) / self._norms(self.initial).square()).sum(1)

    @property
    def n_passes(self) -> int:
        """Forward and backward passes that the next evaluation of the loss takes."""
        return len(self._passes())

    def _passes(self) -> list[list[_Rows]]:
        """The rectangles of each forward and backward pass: one alone, or as many as fit where they can be packed."""
        passes: list[list[_Rows]] = []
        room = 0
        for rows in self._rows:
            tokens = rows.batch.ids.numel()
            if not self.lm.architecture.packs or tokens > room:
                passes.append([])
                room = self._max_tokens
            passes[-1].append(rows)
            room -= tokens
        return passes

    def _loss(self, together: list[_Rows], right: Tensor) -> tuple[Tensor, Tensor]:
        """What the rows of one pass contribute to each fact's NLL and weighted KL, each [facts].

        Counts the targets that are most probable into `right` [facts, contexts].
        """
        hidden = [self._with_delta(rows) for rows in together]
        lengths = [rows.batch.ids.shape[1] for rows in together]
        reads = [(rows, slice(None, len(rows.targets))) for rows in together]
        reads += [(rows, slice(len(rows.targets), None)) for rows in together]  # targets of all rows, then KL terms
        starts = accumulate((rows.batch.ids.numel() for rows in together), initial=0)
        first = [  # place of each row's first token, were all rows laid end to end
            start + length * torch.arange(len(rows.batch.ids), device=rows.fact.device)
            for rows, start, length in zip(together, starts, lengths, strict=False)
        ]
        if self.lm.architecture.packs:
            flat = torch.cat([states.flatten(0, 1) for states in hidden])
            places = {id(rows): begin[rows.at[0]] + rows.at[1] for rows, begin in zip(together, first, strict=True)}
            at = torch.cat([places[id(rows)][read] for rows, read in reads])
            with (
                self._inside(together, first),
                self.lm.starting_at(self._first_block, flat[None]),
                self.lm.before_head(1, (torch.zeros_like(at), at)) as states,
            ):
                self.lm.forward_packed(
                    torch.cat([rows.batch.ids.flatten() for rows in together]),
                    torch.cat([rows.batch.positions.flatten() for rows in together]),
                    [Span.of(r.batch.mask, n, r.cache, flat.dtype) for r, n in zip(together, lengths, strict=True)],
                )
        else:
            (rows,) = together
            with (
                self._inside(together, first),
                self.lm.starting_at(self._first_block, hidden[0]),
                self.lm.before_head(len(rows.batch.ids), rows.at) as states,
            ):
                self.lm.forward(rows.batch, rows.cache)
        for rows, length in zip(together, lengths, strict=True):
            self.tokens.real += int(rows.batch.mask[:, -length:].sum())
            self.tokens.computed += rows.batch.ids.numel()
        targets = torch.cat([rows.targets for rows in together])
        count = len(targets)
        fact = torch.cat([rows.fact[rows.at[0][read]] for rows, read in reads])
        context = torch.cat([rows.context[rows.at[0][read]] for rows, read in reads])[:count]
        weight = torch.cat([rows.weight[read] for rows, read in reads])
        reference = self._unedited(states[0][count:], fact[count:])
        loss, leads = target_nll_kl(states[0], self.lm.head, targets, reference)
        loss = (loss * weight.to(loss.device)).to(self.delta.device)
        right.index_put_((fact[:count], context), leads.to(right), accumulate=True)
        zeros = self.delta.new_zeros(len(self.prompts))
        return zeros.index_add(0, fact[:count], loss[:count]), zeros.index_add(0, fact[count:], loss[count:])

    @contextmanager
    def _inside(self, together: list[_Rows], first: list[Tensor]) -> Iterator[None]:
        """Within the context, each row's δ is added inside the edited block, where the site lies there."""
        with ExitStack() as stack:
            if self._sites == 2:
                delta = torch.cat([self.delta[rows.fact] for rows in together]).chunk(2, dim=1)
                at = torch.cat(first)
                modules = [self.lm.module(Place(self.layer, name)) for name in ("attention_out", "mlp")]
                for module, shift in zip(modules, delta, strict=True):
                    stack.callback(module.register_forward_hook(_add(at, shift)).remove)
            yield

    def _with_delta(self, rows: _Rows) -> Tensor:
        """The edited block's output with each fact's δ at the subject's last token, [rows, suffix, d].

        Where δ is added inside of the block, its input as it is.
        """
        if self._sites == 2:
            return rows.hidden
        delta = self.delta[rows.fact]
        if rows.mlp is not None:
            norm = self.lm.mlp_norm(self.layer)
            assert norm is not None
            shifted = norm((rows.mlp + delta).to(rows.hidden.dtype)) - norm(rows.mlp.to(rows.hidden.dtype))
            delta = shifted.to(delta.dtype)
        first = (rows.hidden[:, 0].to(delta.dtype) + delta).to(rows.hidden.dtype)
        return torch.cat([first[:, None], rows.hidden[:, 1:]], dim=1)

    @torch.no_grad()
    def _unedited(self, hidden: Tensor, facts: Tensor) -> Tensor:
        """Log-probabilities of the KL terms at δ = 0, [rows, vocabulary], which the first call takes from its own."""
        index = facts.tolist()
        if not index:
            return self._no_reference
        if index[0] not in self._reference:
            self._reference.update(zip(index, self.lm.head.log_probs(hidden), strict=True))
        return torch.stack([self._reference[fact] for fact in index])

    @torch.no_grad()
    def _capture(
        self, group: list[tuple[int, int, Row]], places: Tensor, prefixes: PrefixCache | None, prefix_mask: Tensor
    ) -> tuple[_Rows, Tensor]:
        """Run the skipped blocks once. Returns the rows and the site's activation at the lookup, [rows, d].

        `places` [rows] are the group's rows in the prefixes, whose mask is [all rows, prefix].
        """
        lm = self.lm
        facts, contexts, texts = (list(column) for column in zip(*group, strict=True))
        width = max(row.lookup for row in texts)
        cache = None if prefixes is None or not width else prefixes.rows(places, width)
        prefix_mask = prefix_mask[places.to(prefix_mask.device), prefix_mask.shape[1] - width :]
        suffix = pad([row.ids[row.lookup :] for row in texts], lm.pad_id).to(lm.device)
        lengths = torch.tensor([row.lookup for row in texts], device=lm.device)
        batch = Batch(
            suffix.ids,
            torch.cat([prefix_mask, suffix.mask], dim=1),
            suffix.positions + lengths[:, None],
        )
        block, mlp, attention = (
            lm.blocks[self.layer],
            *(lm.module(Place(self.layer, name)) for name in ("mlp", "attention_out")),
        )
        rows, inside = len(group), self.site == "attention+mlp"
        first = (torch.arange(rows), torch.zeros(rows, dtype=torch.long))
        with (
            capture({0: block}, rows, inputs=inside) as hidden,
            capture({0: attention, 1: mlp}, rows, first) as outputs,
            stop_after(block),
        ):
            lm.forward(batch, cache)
        state = hidden[0]
        dtype = torch.promote_types(state.dtype, torch.float32)
        sites = {"block": [state[:, 0]], "mlp": [outputs[1]], "attention+mlp": [outputs[0], outputs[1]]}
        site = torch.cat(sites[self.site], dim=1).to(dtype)
        device = site.device  # a block's input may still lie where the block before it runs
        state = state.to(device)
        reads, weights = [], []
        for kl in (False, True):
            for i, row in enumerate(texts):
                if kl == (not row.targets):
                    count = len(row.targets) or 1
                    last = len(row.ids) - row.lookup
                    reads += [(i, position) for position in range(last - count, last)]
                    rows_of_fact = len(self.prompts[facts[i]].rows)
                    weights += [self.settings.kl_factor if kl else 1 / (count * rows_of_fact)] * count
        read_rows, read_positions = torch.tensor(reads, device=device).T
        captured = _Rows(
            batch,
            None if cache is None else cache.without(range(self._first_block)),
            state,
            outputs[1].to(dtype) if self.site == "mlp" and lm.mlp_norm(self.layer) is not None else None,
            torch.tensor(facts, device=device),
            torch.tensor(contexts, device=device),
            (read_rows, read_positions),
            torch.tensor([t for row in texts for t in row.targets], dtype=torch.long, device=lm.head.weight.device),
            torch.tensor(weights, dtype=dtype, device=device),
        )
        return captured, site


def _add(at: Tensor, shift: Tensor) -> Callable[..., Tensor]:
    """A hook that adds `shift` [n, d] to a module's output at the flat token places `at` [n]."""

    def add(_: nn.Module, __: object, output: Tensor) -> Tensor:
        flat = output.reshape(-1, output.shape[-1]).to(shift.dtype).index_add(0, at.to(output.device), shift)
        return flat.to(output.dtype).view_as(output)

    return add


def optimize_values(
    lm: LanguageModel,
    prompts: Sequence[FactPrompts],
    layer: int,
    site: Site = "block",
    settings: ValueSettings | None = None,
    max_tokens: int = 1024,
    report: Report | None = None,
) -> Values:
    """Run step 1 to its end for `prompts` together, reporting shares of it; see `ValueOptimization`."""
    search = ValueOptimization(lm, prompts, layer, site, settings or ValueSettings(), max_tokens)
    optimizer = search.make_optimizer()
    while not search.done:
        search.backward()
        optimizer.step()
        search.after_step()
        if report is not None:
            report(float(search.progress.mean()), 1.0)
    return search.values()
