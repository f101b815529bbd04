"""What enters against what leaves attention and MLP: how much each of them changes the state, layer by layer."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightedit.analysis.hidden_settings import HiddenStateSettings
from lightedit.analysis.similarities import SUBLAYERS, HiddenStates, Similarities, Sublayer
from lightedit.analysis.unembedding import jaccard, published_jaccard, top_tokens
from lightedit.data.fact import Fact
from lightedit.data.words import counted
from lightedit.digests import digest
from lightedit.errors import ArgumentError, NumericalError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.arguments import check_model
from lightedit.lm.batch import by_length, pad
from lightedit.lm.hooks import capture
from lightedit.lm.sublayers import Sublayers, find_sublayers
from lightedit.progress import progress
from lightedit.runs.kept import KeptRecords, kept_records
from lightedit.runs.provenance import computing, fingerprint_inputs

_Modules = Mapping[tuple[Sublayer, int], nn.Module]
_Compared = tuple[dict[Sublayer, list[float]], dict[Sublayer, list[float]]]
"""Cosine and Jaccard similarity: part -> by layer."""


def hidden_states(
    lm: LanguageModel,
    prompts: Sequence[Fact | str],
    *,
    settings: HiddenStateSettings | None = None,
    checkpoint: str | Path | None = None,
) -> HiddenStates:
    """Compare what enters attention and MLP with what leaves them, at each prompt's last token (Li et al., 2023, PMET).

        found = hidden_states(lm, read_facts("known_facts.json", limit=200))
        found.save("studies/known")

    With h the residual stream that enters a block, a what its attention adds and m what its MLP adds, the attention is
    compared as h against a. The MLP is compared as h + a against m in sequential blocks, and as h against m in parallel
    ones. Two states are compared by their cosine, and by the Jaccard similarity of the sets of their `top` most
    probable tokens after the model's final norm and LM head.

    Args:
        lm: the language model, with its present weights.
        prompts: facts, which stand for their prompts, or texts.
        settings: what is compared, and how.
        checkpoint: a folder of this run only, in which finished prompts are stored. After an interruption, the same
            call resumes from them. Delete it once the result is saved.

    Raises:
        ArgumentError: there are no prompts, one cannot be run, or `top` is larger than the vocabulary.
        UnsupportedModelError: it cannot be told what enters and leaves the model's attention and MLP, or there is no
            chat template.
        NumericalError: a state is not finite.
        ResumeError: `checkpoint` holds another run or a damaged file, or another process uses it.
    """
    check_model(lm, what="the study of hidden states")
    settings = settings or HiddenStateSettings()
    settings.check(lm)
    texts, rows = _encoded(lm, prompts)
    sublayers = find_sublayers(lm)
    # groups do not depend on what is stored, so a resumed run gives the same numbers
    groups = list(by_length(list(map(len, rows)), settings.tokens_per_pass))
    with ExitStack() as stack:
        kept: KeptRecords | None = None
        if checkpoint is not None:
            inputs = _inputs(lm, rows, settings)
            kept = stack.enter_context(kept_records(Path(checkpoint), "hidden-states", inputs))
        found = {} if kept is None else {i: Similarities.from_dict(record) for i, record in kept.records.items()}
        report = stack.enter_context(progress(f"reading {counted(len(rows), 'prompt')}", settings.progress_bar))
        for group in groups:
            missing = [index for index in group if index not in found]
            if missing:
                compared = dict(zip(group, _compare(lm, [rows[i] for i in group], sublayers, settings), strict=True))
                for index in missing:
                    found[index] = Similarities(texts[index], *compared[index])
                    if kept is not None:
                        kept.add(index, found[index].to_dict())
            report(len(found), len(rows))
    ordered = tuple(found[index] for index in range(len(rows)))
    return HiddenStates(lm.name, lm.n_layers, sublayers.parallel, settings, ordered)


def _encoded(lm: LanguageModel, prompts: Sequence[Fact | str]) -> tuple[list[str], list[list[int]]]:
    """The texts of the prompts, and their token ids.

    Raises:
        ArgumentError: there are none, or one cannot be run; the message says which, from 0.
    """
    if isinstance(prompts, str | Fact):
        raise ArgumentError("prompts: one prompt was given; put it into a list")
    if not prompts:
        raise ArgumentError("prompts: the list is empty; give at least one fact or text")
    texts, rows = [], []
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str | Fact):
            raise ArgumentError(f"prompt {number}: expected a Fact or a text, got a {type(prompt).__name__}")
        text, chat = (prompt, False) if isinstance(prompt, str) else (prompt.text, prompt.chat)
        try:
            (row,) = lm.encode([text], chat)
            lm.check_rows([row])
        except ArgumentError as error:
            raise ArgumentError(f"prompt {number}: {error}") from error
        if not row:
            raise ArgumentError(f"prompt {number}: {text!r} has no token; give a text")
        texts.append(text)
        rows.append(row)
    return texts, rows


def _inputs(lm: LanguageModel, rows: Sequence[Sequence[int]], settings: HiddenStateSettings) -> dict[str, Any]:
    """What determines the result."""
    kept = {name: value for name, value in asdict(settings).items() if name not in ("progress_bar", "tokens_per_pass")}
    prompts = {"facts": digest(json.dumps(rows), {})}
    return {**fingerprint_inputs(lm, []), **prompts, **computing(lm), "settings": kept}


@torch.no_grad()
def _compare(
    lm: LanguageModel, rows: Sequence[Sequence[int]], sublayers: Sublayers, settings: HiddenStateSettings
) -> list[_Compared]:
    """The similarities of each of these prompts, which run together."""
    n = len(rows)
    at = (torch.arange(n), torch.tensor([len(row) - 1 for row in rows]))
    entries, exits = _ends(lm, sublayers, settings)
    with (
        capture(entries, n, at, inputs=True) as entering,
        capture(exits, n, at) as leaving,
        lm.before_head(n, at),
    ):
        lm.forward(pad(rows, lm.pad_id))
    found: list[_Compared] = [({}, {}) for _ in rows]
    entered, tokens = torch.empty(0), torch.empty(0)
    for part in SUBLAYERS:
        before = entered
        entered, left = (_stacked(lm, states, part) for states in (entering, leaving))
        if part == SUBLAYERS[0] or not torch.equal(entered, before):  # in parallel blocks both read the same state
            tokens = top_tokens(lm, entered, settings.top, settings.published)
        produced = top_tokens(lm, left, settings.top, settings.published)
        cosine = torch.cosine_similarity(entered.double(), left.double(), dim=1)
        common = published_jaccard(lm.tokenizer, tokens, produced) if settings.published else jaccard(tokens, produced)
        for measured, values in enumerate((cosine, common)):
            for own, by_layer in zip(found, values.view(lm.n_layers, n).T.tolist(), strict=True):
                own[measured][part] = by_layer
    return found


def _ends(lm: LanguageModel, sublayers: Sublayers, settings: HiddenStateSettings) -> tuple[_Modules, _Modules]:
    """The modules whose inputs enter, and those whose outputs leave, each attention and MLP."""
    entries, exits = {}, {}
    for part in SUBLAYERS:
        for layer, sublayer in enumerate(getattr(sublayers, part)):
            entry = lm.blocks[layer] if settings.mlp_input == "block" else sublayer.entry
            entries[part, layer] = lm.module(Place(layer, "q")) if settings.published else entry
            after = settings.after_norm and not settings.published
            exits[part, layer] = sublayer.exit if after else sublayer.matrix
    return entries, exits


def _stacked(lm: LanguageModel, states: Mapping[tuple[Sublayer, int], Tensor], part: Sublayer) -> Tensor:
    """The states of one part at n tokens, layer by layer, [layers * n, d].

    Raises:
        NumericalError: one is not finite.
    """
    stacked = torch.cat([states[part, layer].to(lm.device) for layer in range(lm.n_layers)])
    if not stacked.isfinite().all():
        raise NumericalError(f"a state that enters or leaves the {part} is NaN or infinite; load the model in float32")
    return stacked
