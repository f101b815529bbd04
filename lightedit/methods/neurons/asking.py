"""The prompts at which a fact's neurons are sought, and the answers that are attributed, as tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from lightedit.data.fact import Fact, FactError
from lightedit.data.prompts import Contexts
from lightedit.data.served import encode_served
from lightedit.errors import ArgumentError, UnsupportedModelError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import pad
from lightedit.methods.neurons.attribution import Query

Embeddings = Literal["output", "input"]


@dataclass(frozen=True)
class AskedFact:
    """The prompts of a fact, its own first, and the answer after each of them, as token ids.

    An answer follows its prompt as the fact is served: after its separator or in the chat template, with the end of the
    turn or without.
    """

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]

    def queries(self, published: bool = False) -> list[Query]:
        """One query for each token of each answer, after the true tokens before it.

        Args:
            published: all tokens of an answer after the prompt, as the code of ROME's KN row has them.
        """
        return [
            Query(prompt if published else (*prompt, *answer[:position]), token)
            for prompt, answer in zip(self.prompts, self.answers, strict=True)
            for position, token in enumerate(answer)
        ]

    def saying(self, token: int) -> "AskedFact":
        """The same prompts with an answer of one token."""
        return AskedFact(self.prompts, ((token,),) * len(self.prompts))


def ask(lm: LanguageModel, fact: Fact, texts: Sequence[str], answer: str, published: bool = False) -> AskedFact:
    """The texts as prompts of the fact, with its answer.

    Args:
        lm: the language model.
        fact: the fact, which says how they are served.
        texts: the prompts, the fact's own first.
        answer: the answer, without the separator.
        published: the prompt and the answer tokenised apart, without a space between them.

    Raises:
        FactError: the answer cannot be tokenised or served so, or a text is longer than the model's positions.
    """
    if published:
        prompts = [tuple(row) for row in lm.encode(texts, fact.chat)]
        alone = tuple(lm.tokenizer(answer, add_special_tokens=False)["input_ids"])
        asked = AskedFact(tuple(prompts), (alone,) * len(prompts))
    else:
        n = len(texts)
        rows = encode_served(lm.tokenizer, texts, [answer] * n, [fact.serving] * n)
        asked = AskedFact(
            tuple(tuple(row.ids[: -row.count]) for row in rows), tuple(tuple(row.ids[-row.count :]) for row in rows)
        )
    try:
        lm.check_rows([query.ids for query in asked.queries(published)])
        lm.check_tokens(asked.answers)
    except ArgumentError as error:
        raise FactError(str(error)) from error
    return asked


@dataclass(frozen=True)
class EditedFact:
    """A fact as an editor works on it.

    Attributes:
        prompts: its prompts with the answer that is attributed.
        known: whether this answer is given; else it is what the model says when the fact's round begins.
        old: tokens of the old object; empty for what the model says.
        new: tokens of the new object.
    """

    prompts: AskedFact
    known: bool
    old: tuple[int, ...]
    new: tuple[int, ...]

    @classmethod
    def of(cls, lm: LanguageModel, fact: Fact, answer: str | None, texts: Sequence[str], published: bool) -> Self:
        """The fact whose answer is attributed; None for what the model says. See `ask`."""
        prompts = ask(lm, fact, texts, answer or fact.target_new, published)
        named = answer is not None and not published
        old = object_tokens(lm, fact, answer) if named and answer else ()
        return cls(prompts, answer is not None, old, object_tokens(lm, fact, fact.target_new, published))


def texts_of(fact: Fact, prompts: str, contexts: Contexts) -> list[str]:
    """The texts that ask for a fact, each once, its own prompt first; see `NeuronSearch.prompts`."""
    if prompts == "paraphrases":
        return list(dict.fromkeys([fact.text, *fact.paraphrase_prompts]))
    templates = contexts.templates if prompts == "contexts" else ("{}",)
    return list(dict.fromkeys(template.replace("{}", fact.text) for template in templates))


@torch.no_grad()
def most_probable(lm: LanguageModel, row: Sequence[int]) -> int:
    """The most probable token after a row."""
    with lm.before_head(1, (torch.tensor([0]), torch.tensor([len(row) - 1]))) as states:
        lm.forward(pad([row], lm.pad_id))
    return int(lm.head.logits(states[0].to(lm.head.weight.device)).argmax())


def object_tokens(lm: LanguageModel, fact: Fact, answer: str, published: bool = False) -> tuple[int, ...]:
    """The tokens of an answer whose embeddings stand for it, without the end of the turn; see `ask`."""
    return ask(lm, replace(fact, end_turn=False), [fact.text], answer, published).answers[0]


@torch.no_grad()
def object_embedding(lm: LanguageModel, tokens: Sequence[int], embeddings: Embeddings) -> Tensor:
    """The sum of the tokens' embeddings, [d], float32 or wider.

    Args:
        lm: the language model.
        tokens: token ids.
        embeddings: those of the LM head, which an MLP's output meets, or those of the input. Where a model scales its
            input embeddings behind the embedding module, as Gemma does, they are the unscaled ones.

    Raises:
        UnsupportedModelError: they are not as wide as what an MLP adds.
    """
    table = lm.head.weight if embeddings == "output" else lm.weight(Place(0, "embedding")).T
    chosen = table[torch.tensor(list(tokens), device=table.device)]
    if chosen.shape[1] != lm.d_model:
        raise UnsupportedModelError(
            f"the {embeddings} embeddings of {lm.name} have {chosen.shape[1]} entries, and its MLPs add {lm.d_model}, "
            "so that KN cannot add one to the other"
        )
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32)).sum(0)
