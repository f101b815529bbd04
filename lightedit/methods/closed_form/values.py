"""Step 1: find, for each fact, the activation at the subject's last token that makes the model state the target.

Weights stay frozen, and Adam optimises one vector δ per fact (Meng et al., 2022, arXiv 2202.05262, eq. 4; Meng et al.,
2023, arXiv 2210.07229, eq. 16, with the published code's loss). Everything that does not depend on δ is computed once
(see `rows`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightedit.data.prompts import FactPrompts
from lightedit.errors import NumericalError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.place import Name
from lightedit.methods.closed_form.erasing import Erased
from lightedit.methods.closed_form.joint import Joint, written
from lightedit.methods.closed_form.rows import Rows, capture_rows, first_block, head_states, passes
from lightedit.methods.closed_form.stopping import Evaluated
from lightedit.methods.closed_form.value_settings import ValueSettings
from lightedit.ops import target_nll_kl
from lightedit.progress import Report

Site = Literal["block", "mlp", "attention+mlp"]
_NAMES: dict[Site, tuple[Name, ...]] = {"block": ("block",), "mlp": ("mlp",), "attention+mlp": ("attention_out", "mlp")}


@dataclass(frozen=True)
class Values:
    """The result of step 1 for B facts.

    Attributes:
        targets: v = h0 + δ at the site, [B, d]; [B, 2 d] for "attention+mlp", in that order. At "block" with a norm
            after the MLP: the block's output with δ, then the MLP's, [B, 2 d].
        initial: h0, the activation to which δ is added, [B, d]; [B, 2 d] for "attention+mlp".
        steps: Adam steps taken, [B].
        losses: the last evaluated loss of each fact, [B].
    """

    targets: Tensor
    initial: Tensor
    steps: Tensor
    losses: Tensor


@dataclass
class TokenCount:
    """Count of suffix tokens that were run through the blocks above the edited one, summed over steps.

    Attributes:
        real: tokens without padding.
        computed: tokens with padding.
        passes: forward and backward passes.
    """

    real: int = 0
    computed: int = 0
    passes: int = 0

    def __iadd__(self, other: "TokenCount") -> "TokenCount":
        self.real += other.real
        self.computed += other.computed
        self.passes += other.passes
        return self


class ValueOptimization:
    """The joint optimisation of δ for several facts. Each fact's trajectory equals that of a separate loop.

    Losses are summed over facts and Adam is elementwise, so facts do not influence one another. A finished fact keeps
    its δ, and its rows leave the batch.

    The equality holds up to rounding. Adam's first step of a component is lr g / (|g| + 1e-8), whose size hardly
    depends on that of the gradient g. Where g is only rounding error (seen once in some hundred facts), the order of a
    sum decides the step, in the published loop too, and δ differs by a percent. In float64 it does not.

    Args:
        lm: the language model.
        prompts: the facts' token rows.
        layer: the block in which δ is added.
        site: "block" adds δ to the block's output, "mlp" to the output of its MLP, "attention+mlp" one δ each to the
            outputs of its attention and of its MLP. If a norm follows the MLP, "block" too adds δ to the MLP's output:
            a norm's gains are near 0 in places, so that few outputs of the block can be reached through it.
        settings: see `ValueSettings`.
        max_tokens: most suffix tokens of one forward and backward pass; bounds memory.
        joint: groups of facts that are searched knowing of each other; see `Joint`. Such a group is finished as a
            whole.

    Attributes:
        delta: the parameter, [facts, d]; [facts, 2 d] for two sites; float32 or wider.
        active: which facts are still optimised, [facts] bool.
        most_probable: whether all tokens of the target were the most probable ones in all contexts when the loss was
            evaluated last, [facts] bool; a group of `joint` as a whole.
        tokens: the suffix tokens that were computed so far.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[FactPrompts],
        layer: int,
        site: Site,
        settings: ValueSettings,
        max_tokens: int = 1024,
        joint: Sequence[Joint] = (),
    ) -> None:
        self.lm, self.prompts, self.layer, self.site, self.settings = lm, prompts, layer, site, settings
        self.tokens = TokenCount()
        self._max_tokens = max_tokens
        names = _NAMES["mlp" if site == "block" and lm.mlp_norm(layer) is not None else site]
        self._places = tuple(Place(layer, name) for name in names)
        self._rows, self.initial, self._output = capture_rows(lm, prompts, self._places, settings.kl_factor, max_tokens)
        device = self.initial.device
        self._joint = [each.to(self.initial) for each in joint]
        self.delta = nn.Parameter(torch.zeros_like(self.initial))
        self.active = torch.ones(len(prompts), dtype=torch.bool, device=device)
        self.most_probable = ~self.active
        self._before_step: Tensor | None = None  # δ before the optimizer's step, if lr is relative
        width = lm.d_model
        self._rms = (self._norms(self.initial) / width**0.5).repeat_interleave(width, dim=1)
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
    def done(self) -> bool:
        """Whether all facts are finished."""
        return not bool(self.active.any())

    @property
    def progress(self) -> Tensor:
        """Each fact's steps taken, as a share of its most steps, [facts]; 1 for finished facts."""
        share = self._steps / max(1, self.settings.steps - 1)
        return torch.where(self.active, share, torch.ones_like(share))

    def make_optimizer(self) -> torch.optim.Adam:
        """Adam over δ, as published."""
        return torch.optim.Adam([self.delta], lr=self.settings.lr)

    def backward(self) -> Tensor:
        """Evaluate every active fact's loss, and store the gradients in `delta.grad`.

        Facts whose loss is below the threshold are finished, with their present δ.

        Returns:
            The last evaluated loss of every fact, [facts].

        Raises:
            NumericalError: a loss is NaN or infinite; names the fact.
        """
        self.delta.grad = None
        losses = self._weight_decay()
        losses[self.active].sum().backward()
        losses = losses.detach()
        self._before_step = self.delta.detach().clone() if self.settings.relative_lr else None
        kl, most_probable = torch.zeros_like(losses), torch.zeros_like(self._tokens)
        erased = Erased(self.delta, self._joint) if self.settings.objective == "erase" else None
        for together in passes(self.lm, self._rows, self._max_tokens):
            nll_of_pass, kl_of_pass = self._loss(together, most_probable, erased)
            partial = self._nll_factor * nll_of_pass + kl_of_pass
            partial.sum().backward()
            losses += partial.detach()
            kl += kl_of_pass.detach()
            if erased is not None:
                erased.nll += nll_of_pass.detach()
        if erased is not None:
            losses += erased.finish()
        bad = (~torch.isfinite(losses) & self.active).nonzero().squeeze(1).tolist()
        if bad:
            fact = self.prompts[bad[0]].fact
            raise NumericalError(
                f"the loss of fact {fact.text!r} -> {fact.target_new!r} is {losses[bad[0]].item()} after "
                f"{int(self._steps[bad[0]])} steps; lower lr ({self.settings.lr}), or load the model in float32"
            )
        self._losses = torch.where(self.active, losses, self._losses)
        done = self._losses < self.settings.loss_threshold
        if (rule := self.settings.stopping) is not None:
            step = rule.counted(Evaluated(kl, most_probable, self._tokens, self._times))
            self._times = step.times
            done |= rule.done(step)
            self._nll_factor = rule.nll_factor(step)
        self.most_probable = self._as_groups((most_probable == self._tokens).all(1))
        self.finish(self._as_groups(done))
        return self._losses

    @torch.no_grad()
    def after_step(self) -> None:
        """Scale and clamp δ after an optimizer step, and finish facts that have no step left."""
        if self._before_step is not None:
            # Adam's step does not depend on the scale of the gradient, so scaling the step is scaling lr
            self.delta.copy_(self._before_step + (self.delta - self._before_step) * self._rms)
        norm, initial = self._norms(self.delta), self._norms(self.initial)
        bound = self.settings.clamp_norm_factor * initial
        shrink = torch.where(norm > bound, bound / norm, torch.ones_like(norm))
        self.delta.mul_(shrink.repeat_interleave(self.delta.shape[1] // len(self._places), dim=1))
        self._steps += self.active
        self.finish(self.active & (self._steps >= self.settings.steps - 1))

    def values(self) -> Values:
        """The targets found so far."""
        delta = torch.where(self.active[:, None], self.delta.detach(), self._final)
        targets = self.initial + delta
        if self.site == "block" and (norm := self.lm.mlp_norm(self.layer)) is not None:
            shift = self.lm.anatomy.mlp_scale(self.layer) * _through(norm, self.initial, delta, self.lm.dtype)
            targets = torch.cat([self._output + shift, targets], dim=1)
        return Values(targets, self.initial, self._steps.clone(), self._losses.clone())

    def _as_groups(self, facts: Tensor) -> Tensor:
        """[facts] bool, true for the facts of a group of `joint` only where it is true for all of them."""
        for group in self._joint:
            facts[group.members] = facts[group.members].all()
        return facts

    @torch.no_grad()
    def finish(self, facts: Tensor) -> None:
        """Finish these facts, [facts] bool, with their present δ."""
        facts = facts & self.active
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
        return vectors.unflatten(1, (len(self._places), -1)).norm(dim=2)

    def _weight_decay(self) -> Tensor:
        return self.settings.weight_decay * (self._norms(self.delta) / self._norms(self.initial).square()).sum(1)

    def _loss(self, together: list[Rows], most_probable: Tensor, erased: Erased | None) -> tuple[Tensor, Tensor]:
        """The contributions of one pass's rows to each fact's NLL and weighted KL, each [facts].

        Adds to `most_probable` [facts, contexts] the number of target tokens that are the most probable ones.
        """
        hidden, shifts = self._with_delta(together, erased)
        states, reads = head_states(self.lm, together, hidden, first_block(self._places), shifts)
        for rows in together:
            self.tokens.real += int(rows.batch.mask[:, -rows.length :].sum())
            self.tokens.computed += rows.n_tokens
        self.tokens.passes += 1
        count = len(reads.targets)
        reference = self._unedited(states[count:], reads.fact[count:])
        loss, is_argmax = target_nll_kl(states, self.lm.head, reads.targets, reference)
        loss = (loss * reads.weight.to(loss.device)).to(self.delta.device)
        fact = reads.fact
        most_probable.index_put_((fact[:count], reads.context), is_argmax.to(most_probable), accumulate=True)
        zeros = self.delta.new_zeros(len(self.prompts))
        return zeros.index_add(0, fact[:count], loss[:count]), zeros.index_add(0, fact[count:], loss[count:])

    def _with_delta(self, together: list[Rows], erased: Erased | None) -> tuple[list[Tensor], dict[Place, Tensor]]:
        """The hidden states at which a pass starts, [rows, suffix, d] each, and the shifts inside the edited block.

        A single δ is part of the states, which are the block's output. Two δ are returned as shifts, by place.
        """
        delta = written(self.delta, self._joint)
        of_rows = [delta[rows.fact] if erased is None else erased.of_rows(rows, delta) for rows in together]
        if len(self._places) > 1:
            shifts = torch.cat(of_rows).chunk(len(self._places), dim=1)
            return [rows.hidden for rows in together], dict(zip(self._places, shifts, strict=True))
        return [self._at_output(rows, shift) for rows, shift in zip(together, of_rows, strict=True)], {}

    def _at_output(self, rows: Rows, delta: Tensor) -> Tensor:
        """The edited block's output with δ [rows, d] at the subject's last token, [rows, suffix, d]."""
        if rows.mlp is not None:
            norm = self.lm.mlp_norm(self.layer)
            assert norm is not None
            delta = _through(norm, rows.mlp, delta, rows.hidden.dtype)
        if self._places[0].name == "mlp":
            delta = self.lm.anatomy.mlp_scale(self.layer) * delta
        first = (rows.hidden[:, 0].to(delta.dtype) + delta).to(rows.hidden.dtype)
        return torch.cat([first[:, None], rows.hidden[:, 1:]], dim=1)

    @torch.no_grad()
    def _unedited(self, hidden: Tensor, facts: Tensor) -> Tensor:
        """Log-probabilities of the KL terms at δ = 0, [rows, vocabulary]; stored at a fact's first call."""
        index = facts.tolist()
        if not index:
            return self._no_reference
        if index[0] not in self._reference:
            self._reference.update(zip(index, self.lm.head.log_probs(hidden), strict=True))
        return torch.stack([self._reference[fact] for fact in index])


def _through(norm: nn.Module, states: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """The change of the output of `norm` that δ causes at its input `states`, each [n, d]; computed in `dtype`."""
    return (norm((states + delta).to(dtype)) - norm(states.to(dtype))).to(delta.dtype)


def optimize_values(
    lm: LanguageModel,
    prompts: Sequence[FactPrompts],
    layer: int,
    site: Site = "block",
    settings: ValueSettings | None = None,
    max_tokens: int = 1024,
    report: Report | None = None,
) -> Values:
    """Run step 1 for `prompts` together; `report` receives (share done, 1.0). See `ValueOptimization`."""
    search = ValueOptimization(lm, prompts, layer, site, settings or ValueSettings(), max_tokens)
    optimizer = search.make_optimizer()
    while not search.done:
        search.backward()
        optimizer.step()
        search.after_step()
        if report is not None:
            report(float(search.progress.mean()), 1.0)
    return search.values()
