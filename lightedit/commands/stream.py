"""`lightedit stream`."""

from pathlib import Path

import lightedit as le
from lightedit.analysis.streaming.figures import save_stream_figure
from lightedit.analysis.streaming.result import STREAM_FILE
from lightedit.analysis.streaming.run import check_stream
from lightedit.commands.shared import covariance_of, read_served, remove_runs
from lightedit.errors import ArgumentError, RunFailedError
from lightedit.evaluation.evaluate import rightly

_SETTINGS = le.StreamSettings()


def stream(
    lm: str,
    facts: Path,
    method: le.Method,
    out: Path,
    upstream: Path | None = None,
    covariance: Path | None = None,
    format: str | None = None,
    limit: int | None = None,
    upstream_limit: int | None = None,
    settings: le.StreamSettings = _SETTINGS,
    overwrite: bool = False,
    restart: bool = False,
    chat: bool = False,
    end_turn: bool = False,
    separator: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Edit facts one after the other, and score what was known (TRR) and all edits so far (ERR) as the stream goes on.

    A fact that the model states already is skipped. After an interruption the same command goes on where the stream
    was. The exit status is 3 if an edit did not hold right after it was made, or the stream ended early.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        facts: a file of facts, in any form that edit reads; the stream in its order.
        method: GRACE, Defer, Memory, FT, EWC, Retrain, KN, ROME, MEMIT, EMMET, PMET, AlphaEdit or ENCORE, with its
            settings as method.layer, method.radius and so on.
        out: a folder for stream.csv, stream.json, the figure as .svg and .png, and the edit.
        upstream: a file of facts that the model should go on to know, for TRR; their right answers are scored.
        covariance: a folder that `lightedit covariance` saved, or one of published .npz files; by default the
            covariance is estimated from self-generated text and kept in the cache.
        format: form of the records in both files, such as fact or zsre; by default it is recognised.
        limit: use only this many first facts.
        upstream_limit: use only this many first upstream facts.
        settings: the score, the number of edits, and how often is scored.
        overwrite: replace an earlier result in the folder.
        restart: delete what an interrupted stream has stored.
        chat: serve all facts through the model's chat template: prompts are the user's turn, answers the assistant's.
        end_turn: let answers include the token that ends the turn.
        separator: text between prompts and answers, one space unless the facts say otherwise; '' for none.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"--out {out} is a file; name a folder for the table and the figure")
    if (out / STREAM_FILE).exists() and not overwrite:
        raise ArgumentError(f"--out {out} holds {STREAM_FILE} already; choose another folder, or allow overwriting")
    chosen = read_served(facts, limit, format, chat=chat, end_turn=end_turn, separator=separator)
    known = []
    if upstream is not None:
        known = read_served(upstream, upstream_limit, format, chat=chat, end_turn=end_turn, separator=separator)
    model = le.LanguageModel.load(lm, dtype, device)
    check_stream(model, chosen, [rightly(fact) for fact in known], method, settings)
    moments = covariance_of(model, [method], covariance)
    kept = out.with_name(out.name + ".run")
    if restart:
        remove_runs(kept)
    found = le.stream(model, chosen, method, upstream=known, covariance=moments, settings=settings, checkpoint=kept)
    found.save(out)
    figures = save_stream_figure(found, out)
    if found.edit is not None and found.edit.facts:
        found.edit.save(out / "edit", overwrite=True)
    remove_runs(kept)
    print(found)
    print(f"saved stream.csv, {len(figures)} figures and the edit in {out}")
    if found.stopped is not None or not found.held:
        raise RunFailedError(found.stopped or "an edit did not hold right after it was made; see stream.json")
