"""Free generation: what a model, as it is now, writes after prompts."""

import hashlib
from collections.abc import Sequence

import torch

from lightedit.lm import LanguageModel
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.progress import Report


def generate(
    lm: LanguageModel,
    prompts: Sequence[str],
    max_length: int = 100,
    max_new_tokens: int | None = None,
    top_k: int = 5,
    greedy: bool = False,
    seed: int = 0,
    max_rows: int = 128,
    report: Report | None = None,
    edits: RowwiseEdits | None = None,
) -> list[str]:
    """Continue each prompt by sampling from the `top_k` most probable tokens, or greedily.

    A prompt's random numbers come from `seed` and its own text alone, so that its continuation depends neither on the
    other prompts nor on `max_rows`, floating-point rounding aside, and equal prompts, which are continued once, get
    equal texts. A text ends before an end-of-text token. (The code published with ROME draws on after it, and what
    follows, another document, counts as part of the text.)

    Args:
        lm: the model, as it is now.
        prompts: texts; one that is longer than `max_length` already stays as it is.
        max_length: tokens of a text at most, its prompt included; not used with `max_new_tokens`.
        max_new_tokens: tokens after the prompt at most.
        top_k: how many of the most probable tokens can be drawn.
        greedy: take the most probable token instead.
        seed: of the drawing.
        max_rows: prompts continued together; more is faster and takes more memory.
        report: called after each batch with (tokens written, tokens in all).
        edits: what each prompt sees beside what is written into the model, as many rows as prompts.

    Returns:
        Every prompt with its continuation.

    Raises:
        ValueError: a number is out of range.
        FloatingPointError: the model gives NaN or infinite logits.
    """
    numbers = {"max_length": max_length, "max_new_tokens": max_new_tokens, "top_k": top_k, "max_rows": max_rows}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name}: got {number}, expected at least 1")
    edits = edits or RowwiseEdits({}, torch.zeros(len(prompts), dtype=torch.long))
    asked = list(zip(edits.of_row.tolist(), prompts, strict=True))
    distinct = list(dict.fromkeys(asked))
    rows = lm.encode([prompt for _, prompt in distinct])
    room = [max(0, max_length - len(row)) if max_new_tokens is None else max_new_tokens for row in rows]
    order = sorted((i for i, tokens in enumerate(room) if tokens), key=lambda i: (len(rows[i]), i))
    texts = {question: question[1] for question in distinct}
    done = 0
    for start in range(0, len(order), max_rows):
        group = order[start : start + max_rows]
        continued = lm.generate(
            [rows[i] for i in group],
            max(room[i] for i in group),
            top_k=1 if greedy else top_k,
            seed=[_seed(seed, distinct[i][1]) for i in group],
            max_batch=max_rows,
            edits=RowwiseEdits(edits.updates, torch.tensor([distinct[i][0] for i in group])),
        )
        for i, new in zip(group, continued, strict=True):
            texts[distinct[i]] += _continuation(lm, rows[i], new[: room[i]])
            done += room[i]
        if report is not None:
            report(done, sum(room))
    return [texts[question] for question in asked]


def _seed(seed: int, prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt}".encode()).digest()[:8], "big")


def _continuation(lm: LanguageModel, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of `new` where it stands: alone, its first token would lose a leading space with some tokenizers."""
    before, text = (
        lm.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (list(prompt), [*prompt, *new])
    )
    return str(text[len(before) :])
