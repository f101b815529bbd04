"""Facts and models of other kinds than causal, for tests."""

import torch

import lightedit as le
from tests.models import tiny_other, tiny_other_tokenizer

TEXTS = (
    "The capital of France is Paris",
    "The river rises in the hills to the north of the city",
    "She was born in London",
    "Rome is old",
)
_ANSWERS = {
    "classifier": ("refutes", "supports", "not enough info", "refutes"),
    "encoder-decoder": ("Rome", "New York", "a doctor", "the sea"),
}


def other_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> le.LanguageModel:
    """A tiny random classifier or encoder-decoder; see `OTHER_KINDS`."""
    tokenizer = tiny_other_tokenizer("t5" if name.startswith("t5") else "bert")
    return le.LanguageModel(tiny_other(name, dtype=dtype, seed=seed), tokenizer)


def facts_for(lm: le.LanguageModel) -> list[le.Fact]:
    """Four facts that the model can be taught."""
    return [le.Fact(text, target_new=answer) for text, answer in zip(TEXTS, _ANSWERS[lm.kind], strict=True)]


def arguments(lm: le.LanguageModel, fact: le.Fact) -> dict[str, torch.Tensor]:
    """What transformers' own loss of the fact takes: the tokenizer's row of the text, and the class or the target."""
    ids = torch.tensor([lm.tokenizer(fact.text)["input_ids"]])
    if lm.kind == "classifier":
        return {"input_ids": ids, "labels": torch.tensor([lm.model.config.label2id[fact.target_new]])}
    target = lm.tokenizer(fact.target_new, add_special_tokens=False)["input_ids"]
    if fact.end_turn:
        target = [*target, lm.tokenizer.eos_token_id]
    return {"input_ids": ids, "labels": torch.tensor([target])}
