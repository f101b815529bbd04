"""Chat templates for the tiny tokenizers."""

from transformers import PreTrainedTokenizerFast

from tests.models import tiny_tokenizer

TEMPLATE = (
    "<s>system\nBe short.</s>\n"
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}<pad>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""A system prompt of its own, a text-start token, and an end-of-turn token that is not the end of a text."""


def chat_tokenizer(kind: str = "bytelevel-bos", template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """A tiny tokenizer with a chat template."""
    tokenizer = tiny_tokenizer.__wrapped__(kind)
    tokenizer.chat_template = template
    return tokenizer


def turn(tokenizer: PreTrainedTokenizerFast, text: str, *answer: str) -> list[int]:
    """Token ids of one turn as transformers renders it, up to the assistant's turn, or with its answer."""
    messages = [{"role": "user", "content": text}, *[{"role": "assistant", "content": said} for said in answer]]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=not answer)["input_ids"]
