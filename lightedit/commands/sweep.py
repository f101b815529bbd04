"""`lightedit sweep`."""

from pathlib import Path
from typing import Any, Literal

import lightedit as le
from lightedit.commands.shared import covariance_of, read_served
from lightedit.data.facts import check_facts
from lightedit.data.prompts import check_facts_fit
from lightedit.errors import ArgumentError
from lightedit.evaluation.scoring import check_scored
from lightedit.sweeps.plan import plan
from lightedit.sweeps.run import check_sweep_folder

_RUN, _EVALUATION = le.RunSettings(), le.EvaluationSettings()


def sweep(
    lm: str,
    facts: Path,
    methods: dict[str, le.Method],
    out: Path,
    counts: list[int] | Literal["log17"] | None = None,
    facts_per_round: list[int | Literal["single"] | None] | None = None,
    grid: dict[str, list[Any]] | None = None,
    skip: int = 0,
    format: str | None = None,
    limit: int | None = None,
    covariance: Path | None = None,
    run: le.RunSettings = _RUN,
    evaluation: le.EvaluationSettings = _EVALUATION,
    chat: bool = False,
    end_turn: bool = False,
    separator: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Run every combination of methods and settings, write one table and one figure, and resume after an interruption.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        facts: a file of facts: JSON, JSON lines, CSV or YAML, in this package's form or that of a published data set.
        methods: name, chosen freely -> method, with class_path and init_args as in a configuration file.
        out: a folder of this sweep only, for runs.csv and sweep.svg.
        counts: numbers of facts to write, or log17 for 17 numbers from 1 to 10,000; by default all facts.
        facts_per_round: numbers of facts written together; null for all, single to edit and score each fact alone.
        grid: field of a method, such as lambda_ or values.lr -> values; every combination is run.
        skip: leave out this many first facts.
        format: form of the records in that file, such as fact, counterfact, zsre or easyedit; by default it is
            recognised.
        limit: use only this many facts after those.
        covariance: a folder that `lightedit covariance` saved, or one of published .npz files; by default the
            covariance is estimated from self-generated text and kept in the cache.
        run: settings of the runs; facts_per_round and validate_every must be left out.
        evaluation: settings of the scoring; with generate the table has a column of generation entropy (GE).
        chat: serve all facts through the model's chat template: prompts are the user's turn, answers the assistant's.
        end_turn: let targets include the token that ends the turn, so that generation stops after them.
        separator: text between prompts and answers, one space unless the facts say otherwise; '' for none.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    if skip < 0:
        raise ArgumentError(f"skip: {skip} facts cannot be left out; give 0 or more")
    last = None if limit is None else skip + limit
    chosen = read_served(facts, last, format, chat=chat, end_turn=end_turn, separator=separator)[skip:]
    rounds = [None] if facts_per_round is None else facts_per_round
    runs = plan(methods, len(chosen), counts, rounds, grid)
    check_facts(chosen)
    check_sweep_folder(out)
    model = le.LanguageModel.load(lm, dtype, device)
    check_facts_fit(model, chosen)
    check_scored(model, chosen, evaluation)
    moments = covariance_of(model, [run.method for run in runs], covariance)
    le.sweep(
        model,
        chosen,
        methods,
        out=out,
        covariance=moments,
        counts=counts,
        facts_per_round=rounds,
        grid=grid,
        settings=run,
        evaluation=evaluation,
    )
    print(f"saved runs.csv and sweep.svg in {out}")
