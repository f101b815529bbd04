"""Free generation: texts that a model, with its present weights, writes after prompts."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from lightedit.digests import digest
from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel
from lightedit.lm.distinct import distinct
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.progress import Report

MAX_LENGTH = 100
"""Most tokens of a sampled text, its prompt included."""


def generate(
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    max_length: int = MAX_LENGTH,
    max_new_tokens: int | None = None,
    top_k: int = 5,
    greedy: bool = False,
    seed: int = 0,
    batch_size: int = 128,
    report: Report | None = None,
    edits: RowwiseEdits | None = None,
    chat: bool | Sequence[bool] = False,
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
        chat: whether prompts are the user's turn in the chat template; one for all, or one for each. The template's
            tokens count to a text's length.

    Returns:
        Every prompt with its continuation. An answer in the chat template follows after a line break.

    Raises:
        ArgumentError: a number is out of range, or a text with its new tokens is longer than the model's positions.
        UnsupportedModelError: `chat`, and the model has no chat template.
        FloatingPointError: the model gives NaN or infinite logits.
    """
    numbers = {"max_length": max_length, "max_new_tokens": max_new_tokens, "top_k": top_k, "batch_size": batch_size}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ArgumentError(f"{name}: got {number}, expected at least 1")
    edits = edits or RowwiseEdits.none(len(prompts))
    chats = [chat] * len(prompts) if isinstance(chat, bool) else chat
    asked, place_of = distinct(zip(edits.of_row.tolist(), prompts, chats, strict=True))
    rows = encode(lm, [prompt for _, prompt, _ in asked], [in_chat for *_, in_chat in asked])
    room = [max(0, max_length - len(row)) if max_new_tokens is None else max_new_tokens for row in rows]
    lm.check_rows(rows, room)
    order = sorted((i for i, tokens in enumerate(room) if tokens), key=lambda i: (asked[i][2], len(rows[i]), i))
    texts = [prompt for _, prompt, _ in asked]
    done = 0
    for group in _batches(order, [in_chat for *_, in_chat in asked], batch_size):
        in_chat = asked[group[0]][2]
        continued = lm.generate(
            [rows[i] for i in group],
            max(room[i] for i in group),
            top_k=1 if greedy else top_k,
            seed=[_seed(seed, asked[i][1]) for i in group],
            batch_size=batch_size,
            edits=edits.of(torch.tensor([asked[i][0] for i in group])),
            chat=in_chat,
        )
        for i, new in zip(group, continued, strict=True):
            texts[i] += ("\n" if in_chat else "") + lm.continuation(rows[i], new[: room[i]])
            done += room[i]
        if report is not None:
            report(done, sum(room))
    return [texts[place] for place in place_of]


def encode(lm: LanguageModel, prompts: Sequence[str], chat: Sequence[bool]) -> list[list[int]]:
    """Token ids of each prompt; where `chat` says so, as the user's turn in the chat template."""
    rows: dict[int, list[int]] = {}
    for in_chat in (False, True):
        chosen = [index for index, flag in enumerate(chat) if flag == in_chat]
        rows.update(zip(chosen, lm.encode([prompts[index] for index in chosen], in_chat), strict=True))
    return [rows[index] for index in range(len(prompts))]


def _batches(order: Sequence[int], chat: Sequence[bool], size: int) -> Iterator[Sequence[int]]:
    """Batches of at most `size` prompts, which are all in the chat template or all plain."""
    for _, same in groupby(order, key=lambda index: chat[index]):
        together = list(same)
        yield from (together[start : start + size] for start in range(0, len(together), size))


def _seed(seed: int, prompt: str) -> int:
    return int(digest(f"{seed} {prompt}")[:16], 16)
