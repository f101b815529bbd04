"""ROME and MEMIT as they were published: slow, literal, one fact and one text at a time.

Written straight on a transformers model and its tokenizer and sharing no code with the package, this is what
the package is compared with. Procedures: Meng et al., 2022 (ROME, arXiv 2202.05262) and Meng et al., 2023
(MEMIT, arXiv 2210.07229), in the order of steps of their released code.

Shapes: d = hidden size, d_in = width of the MLP output matrix's input, B = number of facts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

KL_PROMPT = "{} is a"

Site = Literal["block", "mlp"]

_PLACES = {  # model_type -> (list of blocks, MLP output matrix inside a block), unless those of Llama
    "bamba": ("model.layers", "feed_forward.down_proj"),
    "biogpt": ("biogpt.layers", "fc2"),
    "bloom": ("transformer.h", "mlp.dense_4h_to_h"),
    "codegen": ("transformer.h", "mlp.fc_out"),
    "ctrl": ("transformer.h", "ffn.2"),
    "falcon": ("transformer.h", "mlp.dense_4h_to_h"),
    "falcon_h1": ("model.layers", "feed_forward.down_proj"),
    "gemma3": ("model.language_model.layers", "mlp.down_proj"),
    "got_ocr2": ("model.language_model.layers", "mlp.down_proj"),
    "gpt2": ("transformer.h", "mlp.c_proj"),
    "gpt_bigcode": ("transformer.h", "mlp.c_proj"),
    "gpt_neo": ("transformer.h", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "gpt_neox_japanese": ("gpt_neox_japanese.layers", "mlp.dense_4h_to_h"),
    "gptj": ("transformer.h", "mlp.fc_out"),
    "granitemoehybrid": ("model.layers", "shared_mlp.output_linear"),
    "lfm2": ("model.layers", "feed_forward.w2"),
    "lfm3": ("model.layers", "feed_forward.w2"),
    "llava": ("model.language_model.layers", "mlp.down_proj"),
    "mistral3": ("model.language_model.layers", "mlp.down_proj"),
    "modernbert-decoder": ("model.layers", "mlp.Wo"),
    "mpt": ("transformer.blocks", "ffn.down_proj"),
    "nanochat": ("model.layers", "mlp.fc2"),
    "opt": ("model.decoder.layers", "fc2"),
    "persimmon": ("model.layers", "mlp.dense_4h_to_h"),
    "phi": ("model.layers", "mlp.fc2"),
    "qwen3_vl": ("model.language_model.layers", "mlp.down_proj"),
    "starcoder2": ("model.layers", "mlp.c_proj"),
    "xglm": ("model.layers", "fc2"),
}
_OF_LLAMA = ("model.layers", "mlp.down_proj")


class Request(NamedTuple):
    """One fact: `prompt` holds exactly one "{}" for the subject; `target` has no leading space."""

    prompt: str
    subject: str
    target: str = ""


class PublishedValue(NamedTuple):
    """What `published_values` found: target, delta and h0, each [d], and the loss measured with it."""

    target: Tensor
    delta: Tensor
    h0: Tensor
    steps_taken: int
    loss: float


def block(model: PreTrainedModel, layer: int) -> nn.Module:
    """Return transformer block number `layer`, counted from 0."""
    return model.get_submodule(f"{_PLACES.get(model.config.model_type, _OF_LLAMA)[0]}.{layer}")


def mlp_output_matrix(model: PreTrainedModel, layer: int) -> nn.Module:
    """Return the module (Linear, or GPT-2's Conv1D) that ends the MLP of block `layer`."""
    return block(model, layer).get_submodule(_PLACES.get(model.config.model_type, _OF_LLAMA)[1])


def weight_view(model: PreTrainedModel, layer: int) -> Tensor:
    """Return the MLP output matrix of block `layer` as a writable view [d, d_in], however it is stored."""
    module = mlp_output_matrix(model, layer)
    weight = module.weight.detach()
    return weight if isinstance(module, nn.Linear) else weight.T  # Conv1D stores [d_in, d]


def subject_last(tokenizer: PreTrainedTokenizerFast, text_before_subject: str, subject: str, text: str) -> int:
    """Return the position, in the tokens of `text`, of the last token that holds a part of the subject."""
    start = len(text_before_subject)
    end = start + len(subject)
    assert text[start:end] == subject, f"{subject!r} does not follow {text_before_subject!r} in {text!r}"
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    # Special tokens have empty offsets. The bytes of one character may be several tokens with equal offsets.
    return max(i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > start)


def published_values(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    subject: str,
    target: str,
    contexts: Sequence[str],
    layer: int,
    site: Site,
    lr: float,
    steps: int,
    clamp_norm_factor: float,
    kl_factor: float,
    weight_decay: float,
    loss_threshold: float = 0.05,
    target_of_block: bool = False,
    erase: bool = False,
) -> PublishedValue:
    """Optimise the value vector of one fact, running every row in full at every step.

    loss = mean over contexts of (NLL of the target's tokens / their number)
           + kl_factor * KL(p_delta || p_0) at the subject's last token of `KL_PROMPT`
           + weight_decay * ||delta|| / ||h0||²

    delta starts at 0 and is added at the subject's last token of every row, KL row included. A loss below
    `loss_threshold` ends the loop before the step, and so does the last iteration: at most steps - 1 steps of
    Adam are taken, each followed by the projection ||delta|| <= clamp_norm_factor * ||h0||.

    Args:
        prompt: text with one "{}" for the subject.
        contexts: templates with one "{}" for the filled-in prompt; the first is the bare "{}".
        site: where delta is added: the output of block `layer` or of its MLP output matrix.
        target_of_block: whether the target is the block's output in the bare prompt with delta at the site, rather than
            the site's own.
        erase: whether exp(-NLL) takes the place of the NLL, as Hase et al. (2023) erase facts.
    """
    assert contexts[0] == "{}", f"h0 is read in the bare prompt, so contexts must start with '{{}}': {contexts}"
    rows = [_target_row(tokenizer, Request(prompt, subject, target), context) for context in contexts]
    kl_text = KL_PROMPT.replace("{}", subject)
    kl_lookup = subject_last(tokenizer, KL_PROMPT.partition("{}")[0], subject, kl_text)
    lookups = [row.lookup for row in rows] + [kl_lookup]
    input_ids = _pad([row.ids[:-1] for row in rows] + [tokenizer(kl_text)["input_ids"]], tokenizer)
    input_ids = input_ids.to(model.device)
    # No token sees the padding on its right, so none is masked: a masked row of padding longer than a sliding
    # window would have no key at all, which in float64 is NaN and spreads.
    mask = torch.ones_like(input_ids)

    width = model.get_input_embeddings().weight.shape[1]
    delta = torch.zeros(width, dtype=model.dtype, device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=lr)
    h0 = kl_start = None

    def add_delta(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal h0
        hidden = output[0] if isinstance(output, tuple) else output
        changed = hidden.reshape(*input_ids.shape, -1).clone()  # OPT's MLP sees [rows * tokens, d]
        if h0 is None:
            h0 = changed[0, lookups[0]].detach().clone()
        for row, lookup in enumerate(lookups):
            changed[row, lookup] = changed[row, lookup] + delta
        changed = changed.reshape(hidden.shape)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    module = block(model, layer) if site == "block" else mlp_output_matrix(model, layer)
    steps_taken = 0
    for step in range(steps):
        with _hook(module, add_delta):
            logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        log_p = logits.log_softmax(-1)  # [rows, tokens, vocabulary]

        nll = torch.stack(
            [
                -sum(log_p[r, position - 1, row.ids[position]] for position in row.targets) / len(row.targets)
                for r, row in enumerate(rows)
            ]
        ).mean()
        kl_now = log_p[-1, kl_lookup]
        if kl_start is None:
            kl_start = kl_now.detach().clone()
        kl = (kl_now.exp() * (kl_now - kl_start)).sum()
        aim = (-nll).exp() if erase else nll
        loss = aim + kl_factor * kl + weight_decay * delta.norm() / h0.norm() ** 2

        if loss < loss_threshold or step == steps - 1:
            break
        (delta.grad,) = torch.autograd.grad(loss, delta)
        optimizer.step()
        steps_taken += 1
        with torch.no_grad():
            longest = clamp_norm_factor * h0.norm()
            if delta.norm() > longest:
                delta.mul_(longest / delta.norm())

    delta = delta.detach()
    target = h0 + delta
    if target_of_block:
        outputs: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        with torch.no_grad(), _hook(module, add_delta), _hook(block(model, layer), keep):
            model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        target = outputs[0][0, lookups[0]]
    return PublishedValue(target, delta, h0, steps_taken, loss.item())


def published_keys(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    requests: Sequence[Request],
    contexts: Sequence[str],
    layer: int,
    average: Literal["type", "plain"],
) -> Tensor:
    """Return the keys [d_in, B], float64: the MLP output matrix's input at the subject's last token.

    Args:
        average: "plain" takes the mean over all contexts (ROME); "type" takes the mean of the bare prompt and
            the mean of the prefixed ones first, then the mean of those two (MEMIT).
    """
    module = mlp_output_matrix(model, layer)
    keys = []
    for request in requests:
        by_context = {context: _read(model, tokenizer, request, context, module, "input") for context in contexts}
        bare = [key for context, key in by_context.items() if context == "{}"]
        prefixed = [key for context, key in by_context.items() if context != "{}"]
        groups = [bare, prefixed] if average == "type" else [bare + prefixed]
        keys.append(torch.stack([torch.stack(group).mean(0) for group in groups if group]).mean(0))
    return torch.stack(keys, dim=1)


def published_memit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    requests: Sequence[Request],
    contexts: Sequence[str],
    zs: Sequence[Tensor] | Tensor,
    layers: Sequence[int],
    covariances: dict[int, Tensor],
    lam: float,
) -> dict[int, Tensor]:
    """Return MEMIT's weight changes, layer -> ΔW [d, d_in] in float64. The model's weights end as they began.

    Layer by layer, each seeing the changes of those before it, with K its keys, C its covariance and L the
    last edited layer: ΔW = R ((lam C + K Kᵀ)⁻¹ K)ᵀ, R = (z - h_L) / (L - l + 1).

    Args:
        zs: the wanted outputs of block L at the subject's last token of the bare prompts, B vectors [d].
        layers: the edited layers, ascending.
        covariances: layer -> mean second moment of the keys over text [d_in, d_in].
        lam: weight of the covariance.
    """
    wanted = torch.stack([z.double() for z in zs], dim=1)  # [d, B]
    last = layers[-1]
    originals = {layer: weight_view(model, layer).clone() for layer in layers}
    changes = {}
    try:
        for layer in layers:
            keys = published_keys(model, tokenizer, requests, contexts, layer, "type")
            reached = [_read(model, tokenizer, r, "{}", block(model, last), "output") for r in requests]
            residual = (wanted - torch.stack(reached, dim=1)) / (last - layer + 1)
            system = lam * covariances[layer].double() + keys @ keys.T
            changes[layer] = residual @ torch.linalg.solve(system, keys).T
            weight = weight_view(model, layer)
            weight += changes[layer].to(weight.dtype)
    finally:
        for layer, original in originals.items():
            weight_view(model, layer).copy_(original)
    return changes


def published_rome(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    request: Request,
    contexts: Sequence[str],
    value: Tensor,
    layer: int,
    covariance: Tensor,
) -> Tensor:
    """Return ROME's rank-one weight change ΔW [d, d_in] in float64, with the same averaged key k everywhere.

    ΔW = (v - W k - b) (C⁻¹ k)ᵀ / (kᵀ C⁻¹ k), after which W k + b = v. The first release had the bare prompt's
    key in the divisor and in W k; this is the corrected form (Gupta et al., 2024, arXiv 2403.07175).

    Args:
        value: v [d], the wanted output of the MLP output matrix.
        covariance: mean second moment of the keys over text [d_in, d_in].
    """
    key = published_keys(model, tokenizer, [request], contexts, layer, "plain")[:, 0]
    output = weight_view(model, layer).double() @ key
    bias = mlp_output_matrix(model, layer).bias
    if bias is not None:
        output = output + bias.detach().double()
    direction = torch.linalg.solve(covariance.double(), key)
    return torch.outer(value.double() - output, direction) / (key @ direction)


class _Row(NamedTuple):
    ids: list[int]  # the whole text, target included
    lookup: int
    targets: list[int]  # positions of the target's tokens


def _target_row(tokenizer: PreTrainedTokenizerFast, request: Request, context: str) -> _Row:
    before, prompt = _fill(request, context)
    text = prompt + " " + request.target
    encoding = tokenizer(text, return_offsets_mapping=True)
    targets = [i for i, (_, end) in enumerate(encoding["offset_mapping"]) if end > len(prompt)]
    return _Row(encoding["input_ids"], subject_last(tokenizer, before, request.subject, text), targets)


def _fill(request: Request, context: str) -> tuple[str, str]:
    """Return the text before the subject and the whole prompt, in this context."""
    before = context.partition("{}")[0] + request.prompt.partition("{}")[0]
    return before, context.replace("{}", request.prompt.replace("{}", request.subject))


def _pad(rows: list[list[int]], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return the token ids [rows, tokens], padded on the right, where default positions stay right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])


@torch.no_grad()
def _read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    request: Request,
    context: str,
    module: nn.Module,
    side: Literal["input", "output"],
) -> Tensor:
    """Return the module's input or output at the subject's last token in float64, from one unpadded text."""
    before, prompt = _fill(request, context)
    lookup = subject_last(tokenizer, before, request.subject, prompt)
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        hidden = args[0] if side == "input" else output[0] if isinstance(output, tuple) else output
        seen.append(hidden.reshape(-1, hidden.shape[-1])[lookup].double().clone())  # Falcon adds to it in place

    with _hook(module, keep):
        model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device), use_cache=False)
    return seen[0]


@contextmanager
def _hook(module: nn.Module, function: Any) -> Iterator[None]:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()
