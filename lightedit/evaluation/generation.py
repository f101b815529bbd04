"""Free generation: texts that a model, with its present weights, writes after prompts."""

from collections.abc import Sequence

import torch

from lightedit.digests import digest
from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel
from lightedit.lm.distinct import distinct
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.progress import Report


def generate(
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    max_length: int = 100,
    max_new_tokens: int | None = None,
    top_k: int = 5,
    greedy: bool = False,
    seed: int = 0,
    batch_size: int = 128,
    report: Report | None = None,
    edits: RowwiseEdits | None = None,
) -> list[str]:
    """Continue each prompt by sampling from the `top_k` most probable tokens, or greedily.

    A prompt's random numbers depend only on `seed` and the prompt's text. Its continuation is therefore the same,
    except for floating-point rounding, whatever the other prompts and `batch_size` are. Equal prompts are continued
    once. A text ends before an end-of-text token. (The code published with ROME samples on after this token, and
    counts the document that follows as part of the text.)

    Args:
        lm: the model, with its present weights.
        prompts: texts; one that has `max_length` tokens or more is not continued.
        max_length: most tokens of a text, its prompt included; not used with `max_new_tokens`.
        max_new_tokens: most tokens after the prompt.
        top_k: number of most probable tokens that are sampled from.
        greedy: take the most probable token instead.
        seed: seed of the sampling.
        batch_size: prompts continued together; more is faster and takes more memory.
        report: called after each batch with (tokens written, tokens in all).
        edits: the edit with which each prompt runs, in addition to the model's weights; as many rows as prompts.

    Returns:
        Every prompt with its continuation.

    Raises:
        ArgumentError: a number is out of range.
        FloatingPointError: the model gives NaN or infinite logits.
    """
    numbers = {"max_length": max_length, "max_new_tokens": max_new_tokens, "top_k": top_k, "batch_size": batch_size}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ArgumentError(f"{name}: got {number}, expected at least 1")
    edits = edits or RowwiseEdits.none(len(prompts))
    asked, place_of = distinct(zip(edits.of_row.tolist(), prompts, strict=True))
    rows = lm.encode([prompt for _, prompt in asked])
    room = [max(0, max_length - len(row)) if max_new_tokens is None else max_new_tokens for row in rows]
    order = sorted((i for i, tokens in enumerate(room) if tokens), key=lambda i: (len(rows[i]), i))
    texts = [prompt for _, prompt in asked]
    done = 0
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        continued = lm.generate(
            [rows[i] for i in group],
            max(room[i] for i in group),
            top_k=1 if greedy else top_k,
            seed=[_seed(seed, asked[i][1]) for i in group],
            batch_size=batch_size,
            edits=RowwiseEdits(edits.updates, torch.tensor([asked[i][0] for i in group])),
        )
        for i, new in zip(group, continued, strict=True):
            texts[i] += _continuation(lm, rows[i], new[: room[i]])
            done += room[i]
        if report is not None:
            report(done, sum(room))
    return [texts[place] for place in place_of]


def _seed(seed: int, prompt: str) -> int:
    return int(digest(f"{seed} {prompt}")[:16], 16)


def _continuation(lm: LanguageModel, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of `new` after `prompt`. Decoded alone, it would lose its leading space with some tokenizers."""
    before, text = (
        lm.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (list(prompt), [*prompt, *new])
    )
    return str(text[len(before) :])
