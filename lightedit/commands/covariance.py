"""`lightedit covariance`."""

from pathlib import Path

import lightedit as le
from lightedit.lm.place import Name, Place


def covariance(
    lm: str,
    layers: list[int],
    out: Path,
    text: str | None = None,
    tokens: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    attention: bool = False,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Estimate the second moments of the keys that an edit preserves, and save them.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        layers: layers whose MLP output matrix will be edited, such as [4,5,6,7,8].
        out: folder for covariance.safetensors.
        text: a text file or the id of a data set; by default the model writes its own text.
        tokens: how many tokens to read; by default 10 per input dimension of the matrix.
        sequence_length: tokens of one window of text; by default 256, or 128 for the model's own writing.
        seed: of the model's own writing.
        attention: also for the attention's output matrices of these layers, which PMET with write_attention writes.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder for covariance.safetensors")
    model = le.LanguageModel.load(lm, dtype, device)
    names: tuple[Name, ...] = ("mlp", "attention_out") if attention else ("mlp",)
    places = [Place(layer, name) for layer in layers for name in names]
    found = le.estimate_covariance(model, places, text=text, tokens=tokens, sequence_length=sequence_length, seed=seed)
    print(f"saved {found.save(out)} ({found.provenance.tokens} tokens of {found.provenance.corpus})")
