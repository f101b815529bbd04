"""Clean and corrupted runs of one prompt, the starting point of restorations."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightedit.analysis.prompts import TracedPrompt
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import Batch
from lightedit.lm.cache import PrefixCache, RecordingCache
from lightedit.lm.hooks import At
from lightedit.lm.place import Name
from lightedit.lm.prefix import prefix_cache

_HEAD_ROWS = 128  # positions whose logits exist at one time


@dataclass(frozen=True)
class Runs:
    """The clean run and the S corrupted runs of one prompt, from the subject's first token on: s tokens.

    Attributes:
        prompt: the prompt.
        clean: place -> its output in the clean run, [1, s, d].
        corrupted: place -> its output in the corrupted runs, [S, s, d].
        p_clean: probability of the answer in the clean run.
        p_corrupted: that in each corrupted run, [S].
        cache: keys and values of all tokens in the corrupted runs if passes can be packed, else those of the tokens
            before the subject, [S, ...]; None if there are none.
        noise: what was added to the subject's embeddings, [S, subject tokens, d].
        replaces: whether it took their place instead.
    """

    prompt: TracedPrompt
    clean: Mapping[Place, Tensor]
    corrupted: Mapping[Place, Tensor]
    p_clean: float
    p_corrupted: Tensor
    cache: PrefixCache | None
    noise: Tensor
    replaces: bool

    @property
    def first(self) -> int:
        """Position of the first of the s tokens."""
        return self.prompt.subject[0]

    @property
    def samples(self) -> int:
        return len(self.noise)


@torch.no_grad()
def run_clean_and_corrupted(
    lm: LanguageModel, prompt: TracedPrompt, noise: Tensor, names: Sequence[Name], replace: bool = False
) -> Runs:
    """Run a prompt as it is, and with noise at the subject's embeddings.

    Args:
        lm: the language model.
        prompt: the prompt.
        noise: what is added to the output of the embedding at the subject's tokens, [S, subject tokens, d].
        names: names of the places whose outputs are kept in every layer, besides "block".
        replace: whether the noise takes the place of the embeddings.
    """
    first, samples = prompt.subject[0], len(noise)
    places = [Place(layer, name) for layer in range(lm.n_layers) for name in (*names, "block")]
    prefix, _ = prefix_cache(lm, [prompt.ids[:first]])
    with lm.capture(places, 1) as clean, lm.before_head(1, read_tokens(prompt, 1)) as read:
        lm.forward(suffix_batch(prompt, 1), prefix)
    p_clean = answer_probability(lm, read[0], prompt)

    caches = None if prefix is None else prefix.rows(torch.zeros(samples, dtype=torch.long))
    recording = RecordingCache(caches, lm.n_layers) if lm.architecture.supports_packing else None
    with (
        corrupted_embeddings(lm, noise, replace),
        lm.capture(places, samples) as corrupted,
        lm.before_head(samples, read_tokens(prompt, samples)) as read,
    ):
        lm.forward(suffix_batch(prompt, samples), caches if recording is None else recording)
    p_corrupted = answer_probability(lm, read[0], prompt)
    cache = caches if recording is None else recording.recorded()
    return Runs(prompt, clean, corrupted, float(p_clean), p_corrupted, cache, noise, replace)


def corrupted_embeddings(lm: LanguageModel, noise: Tensor, replace: bool) -> AbstractContextManager[None]:
    """Within the context, the embeddings of the first tokens of all rows are corrupted."""
    change = lm.replace_at if replace else lm.add_at
    return change(Place(0, "embedding"), noise.flatten(0, 1), all_tokens(*noise.shape[:2]))


def answer_probability(lm: LanguageModel, hidden: Tensor, prompt: TracedPrompt) -> Tensor:
    """The joint probability of the answer's tokens, [n], from the head's inputs at them, [n * m, d]."""
    head = lm.head
    targets = torch.tensor(prompt.targets, device=head.weight.device).repeat(len(hidden) // len(prompt.targets))
    parts = []
    for states, wanted in zip(hidden.to(head.weight.device).split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True):
        logits = head.logits(states)
        parts.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(dim=1))
    return torch.cat(parts).reshape(-1, len(prompt.targets)).sum(dim=1).exp()


def suffix_batch(prompt: TracedPrompt, rows: int) -> Batch:
    """The prompt from the subject's first token on, `rows` times."""
    first, end = prompt.subject[0], len(prompt.ids)
    return Batch(
        torch.tensor(prompt.ids[first:]).repeat(rows, 1),
        torch.ones(rows, end, dtype=torch.bool),
        torch.arange(first, end).repeat(rows, 1),
    )


def read_tokens(prompt: TracedPrompt, rows: int) -> At:
    """The tokens of every row at which the answer is predicted."""
    columns = torch.tensor(prompt.reads) - prompt.subject[0]
    return torch.arange(rows).repeat_interleave(len(columns)), columns.repeat(rows)


def all_tokens(rows: int, tokens: int) -> At:
    """The first `tokens` tokens of every row."""
    return torch.arange(rows).repeat_interleave(tokens), torch.arange(tokens).repeat(rows)
