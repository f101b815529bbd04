"""Special tokens: padding, start of text and end of text."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id for padding. Padding is masked, so any valid id serves."""
    return _first(tokenizer.pad_token_id, tokenizer.eos_token_id, 0)


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The first token of a text: beginning-of-text, or end-of-text if there is none."""
    return _first(tokenizer.bos_token_id, tokenizer.eos_token_id, pad_token(tokenizer))


def end_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those in the checkpoint's generation config."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)  # custom classes may have none
    ids = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(token for token in ids if token is not None))


def _first(*tokens: int | None) -> int:
    return next(int(token) for token in tokens if token is not None)
