"""`lightedit covariance`."""

from pathlib import Path

import lightedit as le
from lightedit.errors import ArgumentError


def covariance(
    lm: str,
    out: Path,
    layers: list[int] | None = None,
    method: le.Method | None = None,
    text: str | None = None,
    tokens: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Estimate the second moments of the keys that an edit preserves, and save them.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        out: folder for covariance.safetensors.
        layers: layers whose MLP output matrix will be edited, such as [4,5,6,7,8].
        method: instead of layers, the method that needs the covariance, with its settings. Needed for matrices other
            than the MLP's, such as those of PMET with write_attention.
        text: a text file or the id of a data set; by default text is self-generated.
        tokens: number of tokens to read; by default 10 per input dimension of the matrix.
        sequence_length: tokens of one window of text; by default 256, or 128 for self-generated text.
        seed: random seed of self-generated text.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"--out {out} is a file; name a folder for covariance.safetensors")
    places = method if layers is None else layers
    if places is None or (layers is not None and method is not None):
        raise ArgumentError("give --layers, or --method with its layers: what the covariance is for")
    model = le.LanguageModel.load(lm, dtype, device)
    found = le.estimate_covariance(model, places, text=text, tokens=tokens, sequence_length=sequence_length, seed=seed)
    print(f"saved {found.save(out)} ({found.provenance.tokens} tokens of {found.provenance.corpus})")
