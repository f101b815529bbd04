"""Both steps of an edit as one fit: an epoch is a round of facts, a training step one Adam step on a chunk's δ."""

import time
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn

from lightedit.data.facts import Fact, FactError
from lightedit.data.modules import Chunk, FactsDataModule
from lightedit.data.prompts import FactPrompts, merge_prompts, tokenize_facts
from lightedit.editing.artefact import Edit, EditError
from lightedit.editing.retention import FILE, RetentionScores, curves, defined
from lightedit.evaluation.scoring import score_facts
from lightedit.lm import LanguageModel, Place
from lightedit.lm.weights import LowRankUpdate
from lightedit.methods import Method
from lightedit.methods.closed_form.keys import KeyWalk
from lightedit.methods.closed_form.preservation import key_similarity, low_rank_update
from lightedit.methods.closed_form.values import TokenCount, ValueOptimization
from lightedit.methods.closed_form.writing import read_keys, write_facts
from lightedit.metrics import edit_metrics
from lightedit.runs.provenance import provenance
from lightedit.runs.tables import log_folder, write_table
from lightedit.statistics.covariance import Covariance

OnCollision = Literal["error", "merge", "keep"]

_KEYS_AT_ONCE = 256  # facts whose hidden states are in memory while keys are compared


class EditModule(LightningModule):
    """Runs a locate-then-edit method under a trainer.

    Each training step is one Adam step on the δ of a chunk of facts. When the round's last chunk is finished, the
    round is written: layer by layer, keys are read and the closed-form update is solved. Validation then scores the
    model as it is, on the facts of this round and of all earlier ones. The language model is not a submodule, so the
    trainer neither moves, wraps nor checkpoints it.

    Args:
        lm: the model to edit.
        method: what to run.
        covariance: second moments of the keys of the method's matrices.
        on_collision: what to do about facts of one round whose keys nearly coincide, such as two facts about one
            subject: "error" refuses them before work starts, "merge" gives them one key and finds one value that
            serves the texts of all, "keep" writes each by itself all the same.
        collision_similarity: cosine, in the metric of the preservation term, from which two keys collide. Different
            subjects reach about 0.7, two prompts about one subject mostly more than 0.85 (SmolLM2, layer 4).
        max_tokens: tokens of one forward and backward pass at most; bounds memory.
        targets: fact's index -> value at the method's site, [d], or [2 d] for two sites, found before under the same
            settings on the model as it is when the fit starts. In the first round these facts skip step 1, unless they
            are merged.

    Attributes:
        edit: what has been written so far; set when a fit starts.
        retention: a row for each validation in a fit and each round written by then: "round", the number of rounds
            written; "origin", the round in which the scored facts were written, both counted from 1; "facts", their
            number; and their scores in percent. Also written to retention.csv in the first logger's folder.
        round_keys: matrix -> the keys of the round written last, [d_in, B].
        tokens: tokens that the value optimisation computed.
        seconds: time spent in "values" and "update"; each round's own are logged as "seconds/values" and so on.
    """

    def __init__(
        self,
        lm: LanguageModel,
        method: Method,
        covariance: Covariance,
        on_collision: OnCollision = "error",
        collision_similarity: float = 0.85,
        max_tokens: int = 1024,
        targets: Mapping[int, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if on_collision not in ("error", "merge", "keep"):
            raise ValueError(f"on_collision is 'error', 'merge' or 'keep', got {on_collision!r}")
        self.lm, self.method, self.covariance = lm, method, covariance
        self.on_collision, self.collision_similarity, self.max_tokens = on_collision, collision_similarity, max_tokens
        self.edit: Edit | None = None
        self.retention: list[dict[str, Any]] = []
        self._unscored: FloatingPointError | None = None  # why the model could not be validated after this round
        self.round_keys: dict[Place, Tensor] = {}
        self.tokens = TokenCount()
        self.seconds = {"values": 0.0, "update": 0.0}
        # Stands in for the δ of the chunk at hand, which is exchanged in the optimizer's parameter group
        self.delta = nn.Parameter(torch.zeros(1))
        self._search: ValueOptimization | None = None
        self._chunk: Chunk | None = None
        self._targets: dict[int, Tensor] = {}
        self._known = dict(targets or {})
        self._metrics = edit_metrics()
        self._by_origin = RetentionScores()

    # Before work starts

    def on_fit_start(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, FactsDataModule):
            raise TypeError("EditModule needs its facts from a FactsDataModule: trainer.fit(module, datamodule=...)")
        self.lm.check_layers(self.method.layers)
        limit = self.method.facts_per_solve
        if limit is not None and data.facts_per_round > limit:
            raise ValueError(
                f"{type(self.method).__name__} writes {limit} fact per round, but facts_per_round is "
                f"{data.facts_per_round}; give facts_per_round={limit}"
            )
        size = self.lm.d_model * (2 if self.method.site == "attention+mlp" else 1)
        for index, value in self._known.items():
            if value.shape != (size,):
                raise ValueError(
                    f"targets: the value of fact {index} is {tuple(value.shape)}, but {self.method.site!r} takes "
                    f"{(size,)}; find it at that site"
                )
        self._rounds, self._facts = data.rounds, data.facts
        self._preservation = self.method.factors(self.lm, self.covariance)
        self._contexts = self.method.contexts.sample(self.lm)
        # None stands for a fact that was merged into an earlier one
        self._prompts: list[FactPrompts | None] = list(tokenize_facts(self.lm.tokenizer, data.facts, self._contexts))
        self._resolve_collisions(data.facts)
        self._check_independence()
        self.retention, self._unscored = [], None
        self.edit = Edit(
            model=self.lm.name,
            fingerprint=self.lm.fingerprint,
            provenance=provenance(self.lm, self.method, self._contexts, self.covariance),
        )
        if self.lm.weights.owners:
            self.edit.provenance["on_top_of"] = sorted({owner.partition(":")[0] for owner in self.lm.weights.owners})

    def _resolve_collisions(self, facts: Sequence[Fact]) -> None:
        # Nothing upstream of the first edited layer ever changes, so its MLP's keys can be read for all rounds at once;
        # where its attention is written too, they move a little
        layer = self.method.layers[0]
        prompts = [prompt for prompt in self._prompts if prompt is not None]
        keys = self._first_keys(prompts)
        if not torch.isfinite(keys).all():
            raise FloatingPointError(f"keys at layer {layer} hold NaN or infinity; load the model in float32")
        if self.on_collision == "keep":
            return
        for round_ in self._rounds:
            similarity = key_similarity(self._preservation[Place(layer)], keys[:, round_]).triu(1)
            if (highest := similarity.max()) < self.collision_similarity:
                continue
            if self.on_collision == "merge":
                for group in _groups(similarity >= self.collision_similarity):
                    members = [round_[i] for i in group]
                    merged = merge_prompts([prompts[member] for member in members])
                    for member in members:
                        self._prompts[member] = merged if member == members[0] else None
                        self._known.pop(member, None)
                continue
            first, second = divmod(int(similarity.argmax()), len(round_))
            one, other = facts[round_[first]], facts[round_[second]]
            raise FactError(
                f"the keys of {one.text!r} -> {one.target_new!r} (fact {round_[first]}) and {other.text!r} -> "
                f"{other.target_new!r} (fact {round_[second]}) collide: their cosine is {highest:.3f} at layer "
                f"{layer}, so one solve cannot give both their own value. Write them in different rounds "
                "(facts_per_round), leave one out, or pass on_collision='merge' or 'keep'"
            )

    def _check_independence(self) -> None:
        """Refuse rounds that no update can write exactly, where the method demands that."""
        matrix = Place(self.method.layers[0])
        for number, round_ in enumerate(self._rounds):
            prompts = [prompt for index in round_ if (prompt := self._prompts[index]) is not None]
            if len(prompts) < 2 or self.method.gamma(len(prompts)) > 0:
                continue
            keys = self._first_keys(prompts)
            try:
                low_rank_update(self._preservation[matrix], keys, keys[:1], 0.0)
            except ValueError as error:
                raise FactError(
                    f"round {number + 1} of {len(self._rounds)}: {error}, fewer at a time (facts_per_round), or give "
                    "up exactness (EMMET: mu above 0)"
                ) from error

    def _first_keys(self, prompts: Sequence[FactPrompts]) -> Tensor:
        """The keys of the first edited matrix, [d_in, B] float64, read a few facts at a time to save memory."""
        layer = self.method.layers[0]
        groups = [prompts[start : start + _KEYS_AT_ONCE] for start in range(0, len(prompts), _KEYS_AT_ONCE)]
        return torch.cat([KeyWalk(self.lm, group, Place(layer)).keys() for group in groups], dim=1)

    def configure_optimizers(self) -> torch.optim.Adam:
        return torch.optim.Adam([self.delta], lr=self.method.values.lr)

    def on_train_epoch_start(self) -> None:
        self._seconds_before = dict(self.seconds)  # by now a checkpoint has restored those of earlier rounds

    # Step 1

    def training_step(self, chunk: Chunk, batch_idx: int) -> None:
        if chunk.finished:  # the loader reads one batch ahead, so a chunk comes once more after its last step
            return
        started = time.perf_counter()
        optimizer: Any = self.optimizers()
        if chunk is not self._chunk:
            self._start(chunk, optimizer.optimizer)
        search = self._search
        if search is None:  # all of its facts were merged into others, or are known
            chunk.finished = True
            return
        if not search.done:
            losses = search.backward()
            optimizer.step()
            search.after_step()
            self.log_dict(
                {"loss": losses.mean(), "active_facts": search.active.sum().float()},
                prog_bar=True,
                batch_size=len(chunk),
            )
        if search.done:
            self._finish(chunk, search)
        self.seconds["values"] += time.perf_counter() - started

    def _start(self, chunk: Chunk, optimizer: torch.optim.Optimizer) -> None:
        self._chunk = chunk
        self._search = None
        prompts = {index: prompt for index in chunk.indices if (prompt := self._prompts[index]) is not None}
        if self.current_epoch == 0:  # later rounds start from another model
            device = self.lm.weight(Place(self.method.value_layer)).device
            for index in prompts.keys() & self._known.keys():
                self._targets[index] = self._known[index].to(device, torch.float64)
                del prompts[index]
        if not prompts:
            return
        self._searched = list(prompts)
        self._search = ValueOptimization(
            self.lm,
            list(prompts.values()),
            self.method.value_layer,
            self.method.site,
            self.method.values,
            self.max_tokens,
        )
        optimizer.param_groups[0]["params"] = [self._search.delta]
        optimizer.state.clear()

    def _finish(self, chunk: Chunk, search: ValueOptimization) -> None:
        chunk.finished = True
        values = search.values()
        self._targets.update(zip(self._searched, values.targets.double(), strict=True))
        self.tokens += search.tokens
        self._search = self._chunk = None

    @property
    def fraction_done(self) -> float:
        """Share of all facts whose values are found, facts at work counted by their steps."""
        done: float = len(self._targets) + sum(self.edit.facts_in_round if self.edit else [])
        if self._search is not None:
            done += float(self._search.progress.sum())
        return done / max(1, sum(map(len, self._rounds)))

    # Step 2

    def on_train_batch_end(self, outputs: Any, batch: Chunk, batch_idx: int) -> None:
        if self.trainer.is_last_batch:
            self._write_round(self._rounds[self.current_epoch])

    def _write_round(self, indices: list[int]) -> None:
        """Write one round of facts; on any failure none of it stays."""
        assert self.edit is not None
        started = time.perf_counter()
        prompts = {index: prompt for index in indices if (prompt := self._prompts[index]) is not None}
        units = list(prompts.values())
        targets = torch.stack([self._targets[index] for index in prompts]).T
        owner = self.edit.owner(len(self.edit.rounds))
        updates, self.round_keys = {}, {}
        try:
            for matrix, update, keys in write_facts(self.lm, self.method, self._preservation, units, targets, owner):
                updates[matrix], self.round_keys[matrix] = update, keys
            if self.method.reads_keys_after_writing:
                self.round_keys = read_keys(self.lm, self.method, units)
            self._remember(self.round_keys)
        except BaseException:
            self.lm.weights.remove([owner])
            raise
        self.edit.rounds.append(updates)
        self.edit.facts_in_round.append(len(indices))
        self.edit.facts += [self._facts[index] for index in indices]
        self.seconds["update"] += time.perf_counter() - started
        self.edit.provenance["seconds"] = dict(self.seconds)
        self._targets.clear()
        for matrix, update in updates.items():
            self.log(f"update_norm/layer_{matrix.key}", update.norm(), batch_size=len(indices))
        for step, seconds in self.seconds.items():
            self.log(f"seconds/{step}", seconds - self._seconds_before[step], batch_size=len(indices))

    def _remember(self, keys: dict[Place, Tensor]) -> None:
        if self.method.keeps_past_keys:
            for matrix, of_matrix in keys.items():
                self._preservation[matrix].remember(of_matrix)

    def restore_round(self, updates: dict[Place, LowRankUpdate], facts: int, keys: dict[Place, Tensor]) -> None:
        """Write a round again that an earlier process found; call it once a round, in their order, as a fit starts.

        Args:
            updates: matrix -> update, in the order in which they were written.
            facts: how many facts the round holds.
            keys: matrix -> the round's keys, [d_in, B] float64; read only if the method keeps past keys.
        """
        assert self.edit is not None
        owner = self.edit.owner(len(self.edit.rounds))
        # listed first, so that reverting the edit also undoes a round that fails between two matrices
        self.edit.rounds.append({})
        for matrix, update in updates.items():
            update = update.to(self.lm.weight(matrix).device)
            self.lm.weights.add(owner, matrix, update)
            self.edit.rounds[-1][matrix] = update
        self.edit.facts_in_round.append(facts)
        self.edit.facts = self._facts[: sum(self.edit.facts_in_round)]
        self.round_keys = keys
        self._remember(keys)

    def roll_back(self) -> None:
        """Take the last round back, so that the weights are bit for bit what they were before it was written.

        `edit` and `retention` lose it too. The keys that a method keeps of earlier rounds still hold the round's, so
        the fit must not write another one: set `trainer.should_stop`.

        Raises:
            EditError: no round is written.
        """
        if self.edit is None or not self.edit.rounds:
            raise EditError("no round is written, so there is none to roll back")
        self.lm.weights.remove([self.edit.owner(len(self.edit.rounds) - 1)])
        self.edit.rounds.pop()
        del self.edit.facts[-self.edit.facts_in_round.pop() :]
        self.retention = [row for row in self.retention if row["round"] <= len(self.edit.rounds)]
        self._save_retention()

    @property
    def in_last_round(self) -> bool:
        """Whether the fit ends after this round, if nothing stops it before."""
        epochs = self.trainer.max_epochs
        rounds = len(self._rounds) if epochs in (None, -1) else min(len(self._rounds), epochs)
        return self.current_epoch + 1 >= rounds

    def teardown(self, stage: str) -> None:
        if stage == "fit":  # a trainer holds itself and its module in memory until Python looks for such cycles
            self._preservation = {}

    def on_train_epoch_end(self) -> None:
        unscored, self._unscored = self._unscored, None
        if unscored is not None and not self.trainer.should_stop:
            raise unscored
        if self.in_last_round:
            self.trainer.should_stop = True
        if self.trainer.should_stop and self.trainer.enable_validation:
            self._validate_the_end()

    # Retention

    def on_train_start(self) -> None:
        # after a checkpoint's hook: what an earlier process found of the rounds that it kept
        if self.edit is not None:
            self.retention = self.edit.tables.setdefault("retention", [])

    def validation_step(self, chunk: Chunk, batch_idx: int) -> None:
        try:
            records = score_facts(self.lm, chunk.facts)
        except FloatingPointError as error:
            if self.trainer.state.fn != "fit":
                raise
            self._unscored = error  # raised as the round ends, unless a callback ends the fit there
            return
        self._metrics.update(records)
        self._by_origin.update(chunk.round_ + 1, records)

    def on_validation_epoch_end(self) -> None:
        if self._unscored is not None:
            self._metrics.reset()
            self._by_origin = RetentionScores()
            return
        self.log_dict(defined(self._metrics), prog_bar=True)
        self._metrics.reset()
        scores, self._by_origin = self._by_origin, RetentionScores()
        if self.edit is None or self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
            return
        rows = scores.rows(len(self.edit.rounds))
        self.log_dict(curves(rows))
        self.retention += rows
        self._save_retention()

    def _validate_the_end(self) -> None:
        """Score the rounds that stay, unless that is done.

        The trainer validates every n-th round, and before a callback may stop the fit or take the round back.
        """
        assert self.edit is not None
        written = len(self.edit.rounds)
        if not written or (self.retention and self.retention[-1]["round"] == written):
            return
        data = getattr(self.trainer, "datamodule", None)
        assert isinstance(data, FactsDataModule)
        for index, chunk in enumerate(islice(data.val_dataloader(), written)):
            self.validation_step(chunk, index)
        self.on_validation_epoch_end()

    def _save_retention(self) -> None:
        assert self.edit is not None
        self.edit.tables["retention"] = self.retention
        folder = log_folder(self.trainer)
        if folder is not None and self.retention:
            write_table(folder / FILE, self.retention)


def _groups(linked: Tensor) -> list[list[int]]:
    """Connected components of more than one member in a [n, n] relation, each ascending."""
    linked = linked | linked.T
    left = set(linked.any(1).nonzero().flatten().tolist())
    groups = []
    while left:
        group: set[int] = set()
        border = {min(left)}
        while border:
            group |= border
            border = {j for i in border for j in linked[i].nonzero().flatten().tolist()} - group
        left -= group
        groups.append(sorted(group))
    return groups
