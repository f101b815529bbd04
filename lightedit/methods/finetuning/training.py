"""Training ΔW by gradient descent: one for all facts of a round, or one for each fact as if it were alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from lightedit.data.prompts import FactPrompts
from lightedit.errors import NumericalError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.changes import Change, DenseUpdate
from lightedit.lm.hooks import OutputChange, changed
from lightedit.methods.closed_form.rows import head_states, passes
from lightedit.methods.finetuning.deltas import Deltas, StepRule
from lightedit.methods.finetuning.method import FineTuning
from lightedit.methods.finetuning.rows import Examples, TunedRows, first_block, first_matrix
from lightedit.ops import target_nll_kl


@dataclass
class Group:
    """Rows of one rectangle, and the ΔW that they see.

    Attributes:
        rows: the rows.
        deltas: one training, which all rows see, or one for each fact of the rows.
    """

    rows: TunedRows
    deltas: Deltas

    @property
    def n_tokens(self) -> int:
        """Tokens of all rows, padding included."""
        return self.rows.n_tokens


class Loss:
    """The loss of facts, and its gradients by their ΔW.

    Args:
        lm: the language model.
        method: the method.
        prompts: B facts.
        max_tokens: most tokens of one forward and backward pass.
    """

    def __init__(self, lm: LanguageModel, method: FineTuning, prompts: Sequence[FactPrompts], max_tokens: int) -> None:
        self._lm, self._method, self._prompts, self._max_tokens = lm, method, prompts, max_tokens
        self._places = method.trained(lm)
        self._first = first_matrix(lm, self._places)  # what it adds is part of the states with which a pass starts
        self._layer = first_block(lm, self._places) if self._first is None else self._first.layer + 1
        head = lm.head.weight
        wide = torch.promote_types(head.dtype, torch.float32)
        self._no_reference = torch.empty(0, len(head), dtype=wide, device=head.device)

    def examples(self) -> Examples:
        """The rows of the facts, under the model's present weights."""
        return Examples(self._lm, self._prompts, self._places, self._method.published, self._max_tokens)

    @torch.enable_grad()
    def backward(self, groups: Sequence[Group], scale: float) -> Tensor:
        """Evaluate the facts of `groups`, and add the gradients of `scale` times their summed loss to those of ΔW.

        Returns:
            The loss of each fact, [B], 0 for facts that are in no group.

        Raises:
            NumericalError: a loss is NaN or infinite; names the fact.
        """
        losses = self._no_reference.new_zeros(len(self._prompts))
        for together in passes(self._lm, groups, self._max_tokens):
            nll = self._nll(together)
            facts = torch.cat([group.rows.facts for group in together]).to(nll.device)
            loss = (-nll[facts]).exp() if self._method.erases else nll[facts]
            (scale * loss.sum()).backward()
            losses[facts] = loss.detach()
        for index in (~torch.isfinite(losses)).nonzero().flatten().tolist()[:1]:
            fact = self._prompts[index].fact
            raise NumericalError(
                f"the loss of fact {fact.text!r} -> {fact.target_new!r} is {losses[index].item()}; lower lr "
                f"({self._method.lr}), or load the model in float32"
            )
        return losses

    def _nll(self, together: Sequence[Group]) -> Tensor:
        """The mean NLL of each fact's target, [B], from one pass."""
        rows = [group.rows for group in together]
        hidden = [self._entering(group) for group in together]
        with ExitStack() as stack:
            for place in self._places:
                if place != self._first:
                    port = self._lm.anatomy.port(place)
                    stack.enter_context(changed(port, _adding(place, together)))
            states, reads = head_states(self._lm, rows, hidden, self._layer, {})
        nll, _ = target_nll_kl(states, self._lm.head, reads.targets, self._no_reference)
        zeros = nll.new_zeros(len(self._prompts))
        return zeros.index_add(0, reads.fact.to(nll.device), nll * reads.weight.to(nll))

    def _entering(self, group: Group) -> Tensor:
        """The input of the first block that runs, [rows, tokens, d]."""
        rows, first = group.rows, self._first
        if first is None:
            return rows.hidden
        assert rows.keys is not None
        shift = group.deltas.added(first, rows.keys)
        if (norm := self._lm.mlp_norm(first.layer)) is not None:
            assert rows.outputs is not None
            moved = norm((rows.outputs.to(shift) + shift).to(rows.outputs.dtype))
            shift = (moved - norm(rows.outputs)).to(shift.dtype)
        return (rows.hidden.to(shift) + self._lm.anatomy.mlp_scale(first.layer) * shift).to(rows.hidden.dtype)


def _adding(place: Place, together: Sequence[Group]) -> OutputChange:
    """Adds what each group's ΔW gives at `place`."""

    def change(inputs: Tensor, output: Tensor) -> Tensor:
        if len(together) == 1:  # not packed, so that an encoder-decoder's rows may be those of the decoder
            added = together[0].deltas.added(place, inputs).view(*output.shape)
            return (output.to(added.dtype) + added).to(output.dtype)
        tokens = inputs.flatten(0, 1).split([group.n_tokens for group in together])
        each = [
            group.deltas.added(place, part.unflatten(0, (-1, group.rows.length))).flatten(0, 1)
            for group, part in zip(together, tokens, strict=True)
        ]
        added = torch.cat(each).view(*output.shape)
        return (output.to(added.dtype) + added).to(output.dtype)

    return change


class TrainingTogether:
    """The training of one ΔW on all facts.

    Args:
        lm: the model; its weights are read, not written.
        method: the method.
        prompts: the facts.
        max_tokens: most tokens of one forward and backward pass.
        epochs: most passes over the facts; None for the method's.
        penalty: place -> F of the term sum(F ΔW²), which is added to the loss.
    """

    def __init__(
        self,
        lm: LanguageModel,
        method: FineTuning,
        prompts: Sequence[FactPrompts],
        max_tokens: int,
        epochs: int | None = None,
        penalty: Mapping[Place, Tensor] | None = None,
    ) -> None:
        self._method, self._count, self._epochs = method, len(prompts), epochs or method.epochs
        self._loss = Loss(lm, method, prompts, max_tokens)
        self._examples = self._loss.examples()
        self._draws = torch.Generator().manual_seed(method.seed)
        rule = step_rule(method, len(prompts), penalty)
        self.deltas = Deltas.zeros(lm, method.trained(lm), 1, method.published, rule)

    def run(self, watch: Callable[[float], None]) -> Mapping[Place, DenseUpdate]:
        """Train, calling `watch` with the share that is done; returns place -> change."""
        facts = list(range(self._count))
        parts = [[fact] for fact in facts] if self._method.order == "depth" else [facts]
        for number, part in enumerate(parts):
            self.deltas.restart()
            for epoch in range(self._epochs):
                mean = self._epoch(part)
                watch((number + (epoch + 1) / self._epochs) / len(parts))
                if mean < self._method.stop:
                    break
        return {place: self.deltas.change(place) for place in self.deltas.weights}

    def _epoch(self, facts: Sequence[int]) -> float:
        """One pass over these facts; returns their mean loss, each evaluated before its batch's step."""
        total = 0.0
        for batch in self._batches(facts):
            groups = [Group(rows, self.deltas) for rows in self._examples.rows(batch)]
            loss = float(self._loss.backward(groups, 1 / len(batch)).sum()) / len(batch)
            if loss >= self._method.stop:
                self.deltas.step()
            self.deltas.clear()
            total += loss * len(batch)
        return total / len(facts)

    def _batches(self, facts: Sequence[int]) -> Iterator[list[int]]:
        size = self._method.batch_size
        order = list(facts)
        if len(facts) > size and not self._method.published:
            order = [facts[i] for i in torch.randperm(len(facts), generator=self._draws).tolist()]
        for start in range(0, len(order), size):
            yield order[start : start + size]


class TrainingApart:
    """The training of a ΔW for each fact, as if each fact were alone. All facts take their steps together.

    A fact whose loss is below the method's `stop` is finished, and its rows leave the passes.

    Args:
        lm: the model; its weights are read, not written.
        method: the method.
        prompts: B facts.
        max_tokens: most tokens of one forward and backward pass.

    Attributes:
        progress: each fact's steps taken, as a share of its most steps, [B]; 1 for finished facts.
    """

    def __init__(self, lm: LanguageModel, method: FineTuning, prompts: Sequence[FactPrompts], max_tokens: int) -> None:
        self._method = method
        self._places = method.trained(lm)
        self._loss = Loss(lm, method, prompts, max_tokens)
        rule = step_rule(method, 1)
        self._groups = [
            Group(rows, Deltas.zeros(lm, self._places, len(rows.facts), method.published, rule))
            for rows in self._loss.examples().rows(range(len(prompts)))
        ]
        self._found: dict[int, dict[Place, DenseUpdate]] = {}
        self._steps = 0
        self.progress = torch.zeros(len(prompts))

    @property
    def done(self) -> bool:
        """Whether all facts are finished."""
        return not self._groups

    def step(self) -> Tensor:
        """Take one step for every unfinished fact; returns their losses before it, [unfinished facts]."""
        losses = self._loss.backward(self._groups, 1.0)
        active = torch.cat([group.rows.facts for group in self._groups]).to(losses.device)
        self._finish(losses < self._method.stop)
        for group in self._groups:
            group.deltas.step()
            group.deltas.clear()
            self.progress[group.rows.facts.cpu()] = (self._steps + 1) / self._method.epochs
        self._steps += 1
        if self._steps == self._method.epochs:
            self._finish(torch.ones_like(losses, dtype=torch.bool))
        return losses[active]

    def changes(self) -> list[dict[Place, DenseUpdate]]:
        """The changes of each fact; training must be done."""
        return [self._found[index] for index in range(len(self.progress))]

    def _finish(self, finished: Tensor) -> None:
        """Finish these facts, [B] bool."""
        kept = []
        for group in self._groups:
            facts = group.rows.facts
            over = finished.to(facts.device)[facts]
            for number in over.nonzero().flatten().tolist():
                fact = int(facts[number])
                self._found[fact] = {place: group.deltas.change(place, number) for place in self._places}
                self.progress[fact] = 1.0
            if over.all():
                continue
            if over.any():
                rows = group.rows.keep(~over.repeat_interleave(group.rows.rows_of_fact))
                group = Group(rows, group.deltas.keep((~over).nonzero().flatten()))
            kept.append(group)
        self._groups = kept


def step_rule(method: FineTuning, facts: int, penalty: Mapping[Place, Tensor] | None = None) -> StepRule:
    """The steps of a training on this many facts."""
    return StepRule(method.lr, method.decay(facts), method.published, method.norm, penalty or {})


def rounded(lm: LanguageModel, place: Place, change: DenseUpdate) -> DenseUpdate:
    """What `change` adds to the present weights of `place`, once their sum is rounded to the model's dtype."""
    parts = {}
    for (name, delta), live in zip(change.tensors().items(), (lm.weight(place), lm.bias(place)), strict=False):
        assert live is not None
        start = live.to(delta)
        parts[name] = (start + delta).to(live.dtype).to(delta) - start
    return DenseUpdate(**parts)


def share_kept(written: Change, change: Change) -> float:
    """The share of `change` that is left in `written`: the length of its projection; 1 for a change of 0."""
    pairs = [(part.double(), written.tensors()[name].double()) for name, part in change.tensors().items()]
    whole = sum(float(part.square().sum()) for part, _ in pairs)
    return sum(float((part * kept).sum()) for part, kept in pairs) / whole if whole else 1.0
