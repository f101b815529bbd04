"""Which facts a model knows, before they are traced."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightedit.analysis.prompts import TracedPrompt
from lightedit.analysis.settings import Answer
from lightedit.lm import LanguageModel
from lightedit.lm.batch import by_length, pad

_TOKENS = 2048  # tokens of a pass at most


@dataclass(frozen=True)
class Asked:
    """What a model says to a prompt.

    Attributes:
        said: the most probable token at each position at which a token of the answer is predicted.
        knows: whether these are the answer's tokens.
    """

    said: list[int]
    knows: bool


@torch.no_grad()
def ask(lm: LanguageModel, prompts: Sequence[TracedPrompt], answer: Answer) -> list[Asked]:
    """Ask the model for the answer of every prompt: its first token, or with "joint" all its tokens, teacher-forced."""
    found: dict[int, Asked] = {}
    asked = [prompt if answer == "joint" else prompt.explaining(prompt.targets[:1]) for prompt in prompts]
    for group in by_length([len(prompt.ids) for prompt in asked], _TOKENS):
        members = [asked[i] for i in group]
        reads = [(row, position) for row, prompt in enumerate(members) for position in prompt.reads]
        rows, positions = torch.tensor(reads).T
        with lm.before_head(len(members), (rows, positions)) as states:
            lm.forward(pad([prompt.ids for prompt in members], lm.pad_id))
        said = lm.head.logits(states[0].to(lm.head.weight.device)).argmax(dim=-1).tolist()
        for index, prompt in zip(group, members, strict=True):
            own, said = said[: len(prompt.targets)], said[len(prompt.targets) :]
            found[index] = Asked(own, own == prompt.targets)
    return [found[i] for i in range(len(prompts))]
