"""The training of a hyper-network, as a LightningModule: separate edits in a batch, without dense ΔW."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.nn import functional as F

from lightedit.errors import NumericalError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import pad, rectangles
from lightedit.lm.changes import LowRankUpdate
from lightedit.lm.hooks import stop_after
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.methods.hypernetworks.examples import Drawn, EditorDataModule
from lightedit.methods.hypernetworks.factors import (
    Answered,
    Entered,
    TokenFactors,
    answer_positions,
    log_probs,
    states_at,
    token_factors,
)
from lightedit.methods.hypernetworks.method import HyperNetworkMethod
from lightedit.methods.hypernetworks.network import HyperNetwork

_TOKENS_PER_PASS = 4096  # up to the first edited block, without gradients
_CALIBRATED = 64  # steps' worth of edits, at most, whose factors are seen before the first step


class HyperNetworkModule(LightningModule):
    """Trains a hyper-network on separate edits of one unedited language model.

    A step computes the token factors of B facts, then their edits, and runs rephrasings and locality texts in one pass,
    in which each row sees the edit of its own fact as a product with two thin factors. Blocks below the first edited
    one run once in a step, without gradients, all texts together. The language model is not a submodule, so the
    trainer does not move, wrap or checkpoint it.

    Args:
        lm: the model, which carries no edit.
        method: the method whose network is trained.
        steps: most steps of the training.

    Attributes:
        network: the hyper-network.
        objective: its loss, with what is learned besides the network.
        validation: figures of the last validation: "loss", "answer_loss", "locality_loss"; "success", the share of
            held-out facts whose answer is the most probable one, token by token, after the edit, at their own prompt
            (KE) or a rephrasing (MEND); and "kept", the share of the tokens of their locality texts after which the
            most probable next token is the same as before.
    """

    def __init__(self, lm: LanguageModel, method: HyperNetworkMethod, steps: int) -> None:
        super().__init__()
        self.lm, self.method = lm, method
        self.network: HyperNetwork = method.new_network(lm)
        self.objective = method.objective(steps)
        self.validation: dict[str, float] = {}
        self._entering = _EnteringStates(lm, method.places[0].layer)
        self._conditions: dict[int, list[int]] = {}  # by the example's identity
        self._sums: dict[str, float] = {}

    def setup(self, stage: str) -> None:
        """Compute the condition texts of all facts, and show the network factors if it normalises by them."""
        data = self.data()
        examples = [*data.training, *data.validation]
        if self.network.conditioned and not self._conditions:
            texts = self.method.conditions(self.lm, [one.own for one in examples], [one.fact for one in examples])
            assert texts is not None
            self._conditions = {id(example): text for example, text in zip(examples, texts, strict=True)}
        if self.network.fresh:
            for number in range(min(_CALIBRATED, -(-len(data.training) // data.settings.batch_size))):
                self.network.observe(self.factors([drawn.example.own for drawn in data.draws.step(number)]))

    def data(self) -> EditorDataModule:
        """The facts of the training."""
        data: Any = getattr(self.trainer, "datamodule", None)
        assert isinstance(data, EditorDataModule), "HyperNetworkModule needs an EditorDataModule"
        return data

    def configure_optimizers(self) -> Any:
        return self.objective.optimizer(self.network)

    # A step

    def training_step(self, batch: Sequence[Drawn], batch_idx: int) -> Tensor:
        loss, _ = self.losses(batch)
        self.log("loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale long gradients.

        Raises:
            NumericalError: a gradient is NaN or infinite.
        """
        limit = self.objective.clip
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), float("inf") if limit is None else limit)
        if not torch.isfinite(norm):
            raise NumericalError(
                f"step {self.global_step}: the gradient of the network is NaN or infinite; lower lr, or load the model "
                "in float32"
            )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.objective.after_step()

    def factors(self, rows: Sequence[Answered]) -> Mapping[Place, TokenFactors]:
        """The token factors of each row's loss."""
        self._entering.begin(row.ids for row in rows)
        return self._factors(rows)

    def _factors(self, rows: Sequence[Answered]) -> Mapping[Place, TokenFactors]:
        entered = self._entering([row.ids for row in rows])
        return token_factors(self.lm, rows, self.method.places, self.network.dtype, entered)

    @torch.enable_grad()
    def losses(self, batch: Sequence[Drawn]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of separate edits, and of each edit the other figures of `validation`, [B]."""
        conditions = None
        if self.network.conditioned:
            conditions = [self._conditions[id(drawn.example)] for drawn in batch]
        texts = [text for drawn in batch for text in (drawn.example.own.ids, drawn.rephrasing.ids, *drawn.locality)]
        self._entering.begin(texts, keep=not self.training)
        updates = self.network(self._factors([drawn.example.own for drawn in batch]), conditions)
        figures = self._run(batch, updates)
        return self.objective.loss(figures["answer_loss"], figures["locality_loss"], updates), figures

    def _run(self, batch: Sequence[Drawn], updates: Mapping[Place, LowRankUpdate]) -> dict[str, Tensor]:
        """Run the edited rows, and return each edit's figures, [B]."""
        own = [drawn.example.own for drawn in batch] if self.objective.asks_prompt else []
        asked = [*own, *(drawn.rephrasing for drawn in batch)]
        texts = [text for drawn in batch for text in drawn.locality]
        of_row = [i % len(batch) for i in range(len(asked))] + [i for i, d in enumerate(batch) for _ in d.locality]
        rows, positions = answer_positions(asked)
        text_rows = torch.tensor([i for i, text in enumerate(texts) for _ in text])
        text_positions = torch.tensor([at for text in texts for at in range(len(text))])
        entered = self._entering([*(row.ids for row in asked), *texts])
        at = (torch.cat([rows, len(asked) + text_rows]), torch.cat([positions, text_positions]))
        moved = {place: update.to(self.lm.weight(place).device) for place, update in updates.items()}
        states = states_at(self.lm, entered, at, RowwiseEdits(moved, torch.tensor(of_row)))
        with torch.no_grad():
            before = log_probs(self.lm.head, states_at(self.lm, self._entering(texts), (text_rows, text_positions)))
        log_p = log_probs(self.lm.head, states)
        after, log_p = log_p[len(rows) :], log_p[: len(rows)]
        targets = torch.tensor([token for row in asked for token in row.targets], device=log_p.device)
        device, of_row_at = log_p.device, torch.tensor(of_row)
        nll = -log_p.gather(1, targets[:, None])[:, 0]
        answer = _means(_means(nll, rows.to(device), len(asked)), of_row_at[: len(asked)].to(device), len(batch))
        kl = F.kl_div(after, before, log_target=True, reduction="none").sum(-1)
        same = (after.argmax(-1) == before.argmax(-1)).to(nll)
        locality, kept = (
            _means(_means(each, text_rows.to(device), len(texts)), of_row_at[len(asked) :].to(device), len(batch))
            for each in (kl, same)
        )
        right = _means((log_p.argmax(-1) == targets).to(nll), rows.to(device), len(asked))
        success = (right[: len(batch)] == 1).to(nll)
        return {"answer_loss": answer, "locality_loss": locality, "success": success, "kept": kept}

    # Validation

    def on_validation_epoch_start(self) -> None:
        self._sums = {}

    def validation_step(self, batch: Sequence[Drawn], batch_idx: int) -> None:
        loss, figures = self.losses(batch)
        for name, value in ({"loss": loss.expand(len(batch))} | figures).items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach().double().sum())
        self._sums["facts"] = self._sums.get("facts", 0.0) + len(batch)

    def on_validation_epoch_end(self) -> None:
        facts = self._sums.pop("facts")
        self.validation = {name: value / facts for name, value in self._sums.items()} | self.objective.figures()
        self.log_dict({f"validation/{name}": value for name, value in self.validation.items()})
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.objective.validated(self.validation)


def _means(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """The mean of each group's values, [count]."""
    sums = values.new_zeros(count).index_add(0, groups, values)
    return sums / torch.bincount(groups, minlength=count).to(values)


class _EnteringStates:
    """The input of the first edited block, of each text of a batch. It does not depend on the edits.

    The texts of a batch run together, so that their states depend on nothing before it, and a training that is
    continued has the same bits.

    Args:
        lm: the model, whose weights must stay as they are.
        layer: the block.
    """

    def __init__(self, lm: LanguageModel, layer: int) -> None:
        self._lm, self._layer = lm, layer
        self._states: dict[tuple[int, ...], Tensor] = {}
        self._kept: dict[tuple[tuple[int, ...], ...], dict[tuple[int, ...], Tensor]] = {}

    def begin(self, texts: Iterable[Sequence[int]], keep: bool = False) -> None:
        """Run the texts of a batch up to the block; `keep` keeps their states for when the same batch comes again."""
        if not self._layer:
            return
        distinct = tuple(dict.fromkeys(tuple(text) for text in texts))
        self._states = self._kept.get(distinct) or self._run(distinct)
        if keep:
            self._kept[distinct] = self._states

    @torch.no_grad()
    def _run(self, texts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        """Each text's states, [tokens, d]."""
        block = Place(self._layer, "block")
        found: dict[tuple[int, ...], Tensor] = {}
        for group in rectangles([len(text) for text in texts], _TOKENS_PER_PASS):
            rows = [texts[i] for i in group]
            with (
                self._lm.capture([block], len(rows), inputs=True) as states,
                stop_after(self._lm.module(block), before=True),
            ):
                self._lm.forward(pad(rows, self._lm.pad_id))
            found |= {row: state[: len(row)].clone() for row, state in zip(rows, states[block], strict=True)}
        return found

    def __call__(self, rows: Sequence[Sequence[int]]) -> Entered:
        """Rows of the batch with their states."""
        batch = pad(rows, self._lm.pad_id).to(self._lm.device)
        if not self._layer:
            return Entered(batch)
        width = batch.ids.shape[1]
        states = [self._states[tuple(row)] for row in rows]
        hidden = torch.stack([F.pad(state, (0, 0, 0, width - len(state))) for state in states])
        return Entered(batch, self._layer, hidden)
