"""`lightedit tune`."""

from pathlib import Path

import lightedit as le
from lightedit.editing.tuning import tuning
from lightedit.errors import ArgumentError
from lightedit.files import whole_file

_SETTINGS = le.TuningSettings()


def tune(
    lm: str,
    out: Path | None = None,
    facts: Path | None = None,
    format: str | None = None,
    limit: int | None = None,
    settings: le.TuningSettings = _SETTINGS,
    overwrite: bool = False,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Find MEMIT's settings for a model by trials on facts that it knows, and print their figures.

    Finished trials are kept in the cache: after an interruption the same command goes on, and `lightedit edit` without
    a method uses the settings that came out best.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        out: a .yaml file for the settings, which `lightedit edit --config` reads.
        facts: a file of facts with true targets, paraphrases and neighbourhood prompts; by default built-in ones.
        format: form of the records in that file; by default it is recognised.
        limit: use only this many first facts.
        settings: what is tried.
        overwrite: replace an earlier file.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    if out is not None and out.exists() and not overwrite:
        raise ArgumentError(f"--out {out} exists already; choose another file, or allow overwriting (--overwrite)")
    if out is not None and not out.parent.is_dir():
        raise ArgumentError(f"--out {out}: there is no folder {out.parent}; create it, or choose another file")
    chosen = None if facts is None else le.read_facts(facts, limit, format)
    model = le.LanguageModel.load(lm, dtype, device)
    found = tuning(model, chosen, settings=settings)
    if out is not None:
        with whole_file(out) as unfinished:
            unfinished.write_text(found.config(str(model.dtype).removeprefix("torch.")), encoding="utf-8")
    print(found.table())
    print(f"best: {found.summary}" + ("" if out is None else f"\nwrote {out}"))
