"""States read as vocabulary: their most probable tokens, and how far two such sets agree."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import Batch

_NUMBERS = 2**24  # products with the vocabulary that exist at one time


@torch.no_grad()
def top_tokens(lm: LanguageModel, states: Tensor, top: int, published: bool = False) -> Tensor:
    """The `top` most probable tokens of states, after the final norm and the LM head.

    The model runs without its blocks, so the norm, and whatever else stands before the head, are its own.

    Args:
        lm: the language model.
        states: states of the residual stream, [n, d].
        top: number of tokens.
        published: multiply by the input embeddings instead, without the norm.

    Returns:
        Token ids, most probable first, [n, top].
    """
    weight = lm.weight(Place(0, "embedding")).T if published else lm.head.weight
    rows = max(1, _NUMBERS // len(weight))
    found = []
    for part in states.split(rows):
        # a constant factor or a soft-cap of the logits keeps their order
        products = part.to(weight) @ weight.T if published else lm.head.product(_before_head(lm, part))
        found.append(products.topk(top).indices)
    return torch.cat(found)


def _before_head(lm: LanguageModel, states: Tensor) -> Tensor:
    """What the head reads when the last block gives these states, [n, d]."""
    n = len(states)
    one = torch.zeros(n, 1, dtype=torch.long)
    batch = Batch(one + lm.pad_id, torch.ones(n, 1, dtype=torch.bool), one)
    at = (torch.arange(n), torch.zeros(n, dtype=torch.long))
    hidden = states[:, None].to(lm.device, lm.dtype)
    with lm.starting_at(lm.n_layers, hidden), lm.before_head(n, at) as read:
        lm.forward(batch)
    return read[0].to(lm.head.weight.device)


def jaccard(one: Tensor, other: Tensor) -> Tensor:
    """|A ∩ B| / |A ∪ B| of sets of tokens.

    >>> jaccard(torch.tensor([[1, 2, 3]]), torch.tensor([[3, 4, 1]]))
    tensor([0.5000], dtype=torch.float64)

    Args:
        one: distinct token ids, [n, k].
        other: as many of the other set, [n, k].

    Returns:
        float64, [n].
    """
    both = torch.cat([one, other], dim=1).sort(dim=1).values  # what is in both sets stands there twice
    common = (both[:, 1:] == both[:, :-1]).sum(dim=1).double()
    return common / (2 * one.shape[1] - common)


def published_jaccard(tokenizer: PreTrainedTokenizerBase, one: Tensor, other: Tensor) -> Tensor:
    """The published similarity of lists of tokens, which compares decoded strings.

    The intersection is that of the sets of strings. The union is the sum of the lists' lengths minus the intersection,
    so that strings that occur twice make it too large.

    Args:
        tokenizer: the tokenizer.
        one: token ids, [n, k].
        other: token ids of the other list, [n, k].

    Returns:
        float64, [n].
    """
    known = {token: tokenizer.decode([token]) for token in torch.cat([one, other]).unique().tolist()}
    found = []
    for pair in zip(one.tolist(), other.tolist(), strict=True):
        lists = [[known[token] for token in tokens] for tokens in pair]
        common = len(set(lists[0]) & set(lists[1]))
        found.append(common / (len(lists[0]) + len(lists[1]) - common))
    return torch.tensor(found, dtype=torch.float64)
