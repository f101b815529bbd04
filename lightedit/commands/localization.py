"""`lightedit localization`."""

from dataclasses import asdict
from pathlib import Path

import lightedit as le
from lightedit.analysis.localization.figures import save_figures
from lightedit.analysis.localization.regressions import check_statsmodels
from lightedit.analysis.localization.result import SCORES
from lightedit.commands.shared import read_served, remove_runs
from lightedit.errors import ArgumentError
from lightedit.runs.tables import write_table

_SETTINGS = le.LocalizationSettings()


def localization(
    lm: str,
    facts: Path,
    out: Path,
    methods: dict[str, le.Method] | None = None,
    forcing: dict[str, le.Method] | None = None,
    format: str | None = None,
    limit: int | None = None,
    covariance: Path | None = None,
    settings: le.LocalizationSettings = _SETTINGS,
    overwrite: bool = False,
    restart: bool = False,
    chat: bool = False,
    end_turn: bool = False,
    separator: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Edit facts at several layers, and test whether the scores follow from where the facts are traced to.

    Facts that the model does not know are left out. After an interruption the same command goes on after the edits that
    are finished. Needs statsmodels: pip install 'lightedit[study]'.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        facts: a file of facts with subjects and right answers, such as CounterFact.
        out: a folder for localization.csv, effects.csv, regressions.csv, localization.json and the figures, each as
            .svg and .png.
        methods: name, chosen freely -> method, with class_path and init_args as in a configuration file. It is moved to
            every layer, so that only the number of its layers counts. By default ROME, and MEMIT with 5 layers.
        forcing: name -> the method's settings for fact forcing, where they differ.
        format: form of the records in that file, such as counterfact; by default it is recognised.
        limit: use only this many first facts, known or not.
        covariance: a folder that `lightedit covariance` saved; by default the covariance is estimated from
            self-generated text and kept in the cache.
        settings: what is edited and scored, and how.
        overwrite: replace an earlier study in the folder.
        restart: delete what an interrupted run has stored.
        chat: serve all facts through the model's chat template: prompts are the user's turn, answers the assistant's.
        end_turn: let answers include the token that ends the turn.
        separator: text between prompts and answers, one space unless the facts say otherwise; '' for none.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"--out {out} is a file; name a folder for the tables and the figures")
    if (out / "localization.json").exists() and not overwrite:
        raise ArgumentError(f"--out {out} holds a study already; choose another folder, or allow overwriting")
    check_statsmodels()
    chosen = read_served(facts, limit, format, chat=chat, end_turn=end_turn, separator=separator)
    model = le.LanguageModel.load(lm, dtype, device)
    kept = out.with_name(out.name + ".run")
    if restart:
        remove_runs(kept)
    found = le.localization_study(
        model,
        chosen,
        methods,
        forcing=forcing,
        covariance=None if covariance is None else le.Covariance.load(covariance),
        settings=settings,
        checkpoint=kept,
    )
    found.save(out)
    regressions = [asdict(each) for score in SCORES for each in found.regressions(score)]
    write_table(out / "regressions.csv", regressions)
    figures = save_figures(found, out)
    remove_runs(kept)
    print(found)
    for each in found.regressions():
        print(
            f"{each.problem}, {each.method}: R² of the rewrite score by layer {each.layer:.3f}, by tracing effect "
            f"{each.effect:.3f}, by both {each.both:.3f}; p {each.p:.3g}, clustered by fact {each.p_clustered:.3g}"
        )
    print(f"saved localization.csv, effects.csv, regressions.csv and {len(figures)} figures in {out}")
