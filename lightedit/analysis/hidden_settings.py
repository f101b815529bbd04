"""Settings of the study of hidden states, shared by Python and the command line."""

from dataclasses import dataclass
from typing import Literal, get_args

from lightedit.errors import ArgumentError, UnsupportedModelError
from lightedit.lm import LanguageModel, Place

MlpInput = Literal["residual", "block"]


@dataclass(frozen=True)
class HiddenStateSettings:
    """Settings of the study of hidden states.

    Attributes:
        top: number of the most probable vocabulary tokens that are compared.
        mlp_input: what enters an MLP. residual is the residual stream that its norm reads: h + a in sequential blocks,
            h in parallel ones. block is the block's input h in all models.
        after_norm: where a norm follows a sublayer, as in Gemma 2, 3 and OLMo 2, its output is what leaves that norm,
            which is what the residual stream is given; else it is what enters that norm.
        published: what the published code does. What enters attention and MLP is ln_1(h), which the attention reads.
            Outputs are those before a norm. Tokens are ranked by products with the input embeddings, without the final
            norm and the head's bias. They are compared as decoded strings, in lists whose union is counted as the sum
            of their lengths minus their intersection.
        tokens_per_pass: most tokens of one forward pass, unless one prompt is longer.
        progress_bar: show progress and the time left on standard error.

    Raises:
        ArgumentError: a value is out of range, or `published` excludes it.
    """

    top: int = 50
    mlp_input: MlpInput = "residual"
    after_norm: bool = True
    published: bool = False
    tokens_per_pass: int = 2048
    progress_bar: bool = True

    def __post_init__(self) -> None:
        for name in ("top", "tokens_per_pass"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mlp_input not in get_args(MlpInput):
            raise ArgumentError(f"mlp_input is one of {', '.join(get_args(MlpInput))}, got {self.mlp_input!r}")
        if self.published and (self.mlp_input != "residual" or not self.after_norm):
            raise ArgumentError("published says itself what enters and leaves; leave mlp_input and after_norm out")

    def check(self, lm: LanguageModel) -> None:
        """Check what the settings ask of a model.

        Raises:
            ArgumentError: `top` is larger than the vocabulary.
            UnsupportedModelError: `published`, and it is not known what the attention reads.
        """
        if self.published and "attention" not in lm.architecture.names:
            raise UnsupportedModelError(
                f"{lm.name} has blocks whose attention has no q of its own, so what it reads is not known; leave "
                "published out"
            )
        embedding, head = lm.anatomy.shape(Place(0, "embedding"))[1], len(lm.head.weight)
        if self.top > (entries := embedding if self.published else head):
            raise ArgumentError(f"top: {self.top} tokens, but the vocabulary of {lm.name} has {entries}; give fewer")
