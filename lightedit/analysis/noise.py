"""The noise that corrupts the embeddings of a subject."""

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from lightedit.analysis.prompts import TracedPrompt
from lightedit.analysis.settings import TraceSettings
from lightedit.digests import digest
from lightedit.lm import LanguageModel, Place

_DEGREES = 3  # of freedom of Student's t


@torch.no_grad()
def noise_level(lm: LanguageModel, prompts: Sequence[TracedPrompt], settings: TraceSettings) -> float:
    """ν: the level that the settings give, or a multiple of σ.

    σ is the standard deviation over all entries of the embedding's output at the tokens of all subjects. Where a model
    scales its embeddings in the embedding module, as Gemma 3 does, σ is that of the scaled ones.
    """
    if settings.noise_level is not None:
        return settings.noise_level
    ids = [prompt.ids[prompt.subject.start : prompt.subject.stop] for prompt in prompts]
    if settings.published:
        ids = lm.encode([str(prompt.fact.subject) for prompt in prompts])
    module = lm.module(Place(0, "embedding"))
    tokens = torch.tensor([token for row in ids for token in row], device=lm.device)
    return settings.noise * float(module(tokens).double().std())


def noise_of(prompt: TracedPrompt, width: int, level: float, settings: TraceSettings) -> Tensor:
    """The noise at the subject's tokens in every sample, [S, subject tokens, width], float32."""
    return drawn(prompt.fact.text, (settings.samples, len(prompt.subject), width), level, settings)


def drawn(text: str, shape: tuple[int, int, int], level: float, settings: TraceSettings) -> Tensor:
    """Noise of this shape, [S, tokens, width] float32; it depends on the settings and on the text of its fact."""
    if settings.published:
        return level * _published(shape, settings)
    seed = int(digest(f"{settings.seed}/{text}")[:15], 16)
    draw = torch.Generator().manual_seed(seed)
    if settings.distribution == "uniform":
        return level * (2 * torch.rand(shape, generator=draw) - 1)
    normal = torch.randn(shape, generator=draw)
    if settings.distribution == "normal":
        return level * normal
    squares = torch.randn((_DEGREES, *shape), generator=draw).square().mean(dim=0)
    return level * normal / squares.sqrt()


def _published(shape: tuple[int, int, int], settings: TraceSettings) -> Tensor:
    """The published draws: one seed for every pass."""
    draw = numpy.random.RandomState(1)
    if settings.distribution == "uniform":
        values = draw.uniform(-1, 1, shape)
    elif settings.distribution == "normal":
        values = draw.randn(*shape)
    else:
        values = draw.standard_t(_DEGREES, shape)
    return torch.from_numpy(values).float()
