"""The reference must itself be right: it is checked here against hand calculations and exact properties."""

from functools import partial

import pytest
import torch

from benchmarks import published as reference
from benchmarks.published import (
    Request,
    block,
    mlp_output_matrix,
    published_keys,
    published_memit,
    published_rome,
    published_values,
    subject_last,
    weight_view,
)
from tests.models import ARCHITECTURES, VOCABULARY, tiny_model, tiny_tokenizer

KINDS = ["bytelevel", "bytelevel-bos", "sentencepiece", "unigram"]
CONTEXTS = ["{}", "The river rises. {}", "Because it was long. {}"]
REQUESTS = [
    Request("The capital of {} is", "France", "Rome"),
    Request("{} is owned by", "The old tower", "Berlin"),
    Request("The mother tongue of {} is", "Zoë Müller", "Spanish"),
]

values = partial(published_values, lr=0.5, steps=3, clamp_norm_factor=0.75, kl_factor=0.0625, weight_decay=0.5)


def covariance(width: int) -> torch.Tensor:
    keys = torch.randn(width, 3 * width, dtype=torch.float64)
    return keys @ keys.T / (3 * width)


def write(model, changes: dict[int, torch.Tensor]) -> None:
    for layer, change in changes.items():
        weight_view(model, layer).add_(change.to(model.dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["The capital of France is Paris.", "Zoë Müller lives in 東京 now"])
def test_tiny_tokenizers_round_trip_and_fit_the_tiny_models(kind, text):
    tokenizer = tiny_tokenizer(kind)
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (ids[0] == tokenizer.bos_token_id) == (kind in ("bytelevel-bos", "sentencepiece"))
    assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("subject", ["France", "Danielle Darrieux", "Zoë", "東京"])
@pytest.mark.parametrize("before", ["", "The mother tongue of "])
def test_subject_last_ends_the_subject(kind, subject, before):
    tokenizer = tiny_tokenizer(kind)
    text = before + subject + " was found"
    ids = tokenizer(text)["input_ids"]
    position = subject_last(tokenizer, before, subject, text)
    assert tokenizer.decode(ids[: position + 1], skip_special_tokens=True) == before + subject
    assert tokenizer.decode(ids[:position], skip_special_tokens=True) != before + subject


def test_subject_last_takes_a_token_that_reaches_beyond_the_subject():
    tokenizer = tiny_tokenizer("bytelevel")
    assert tokenizer.tokenize("The capital of") == ["The", "Ġcapital", "Ġof"]
    assert subject_last(tokenizer, "The ", "cap", "The capital of") == 1


def test_tiny_models_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first, expected = tiny_model("llama").state_dict(), torch.rand(1)
    again, other = (
        tiny_model("llama", dtype=torch.float64).state_dict(),
        tiny_model("llama", seed=1).state_dict(),
    )
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name].double(), again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("site", ["block", "mlp"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_values_run_and_improve_on_every_architecture(model_type, site):
    model, tokenizer = tiny_model(model_type, dtype=torch.float64), tiny_tokenizer("sentencepiece")
    request = Request("The mother tongue of {}", "Zoë Müller", "Spanish")
    run = partial(values, model, tokenizer, *request, CONTEXTS, layer=1, site=site, lr=0.1)
    start, end = run(steps=1), run(steps=3)
    assert (start.steps_taken, end.steps_taken) == (0, 2)
    assert torch.equal(start.target, start.h0)
    assert torch.equal(end.target, end.h0 + end.delta)
    assert end.loss < start.loss
    assert all(parameter.grad is None for parameter in model.parameters())
    module = block(model, 1) if site == "block" else mlp_output_matrix(model, 1)
    h0 = reference._read(model, tokenizer, request, "{}", module, "output")
    torch.testing.assert_close(end.h0.double(), h0, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gptj"])
def test_loss_in_the_last_block_equals_the_hand_calculation(model_type):
    """In the last block δ acts on its own token alone, so head(norm(h + δ)) gives every term of the loss."""
    model, tokenizer = tiny_model(model_type, dtype=torch.float64), tiny_tokenizer("bytelevel")
    # The subject ends the prompt, so its last token predicts the target; the KL row reads that token too.
    request = Request("{}", "The tower of the king", "of")
    found = values(model, tokenizer, *request, CONTEXTS, layer=3, site="block", kl_factor=0.3)
    norm = model.get_submodule("model.norm" if model_type == "llama" else "transformer.ln_f")
    hidden = torch.stack([reference._read(model, tokenizer, request, c, block(model, 3), "output") for c in CONTEXTS])
    now, start = (model.lm_head(norm(h)).log_softmax(-1) for h in (hidden + found.delta, hidden))
    (token,) = tokenizer(" of")["input_ids"]
    kl = (now[0].exp() * (now[0] - start[0])).sum()
    expected = -now[:, token].mean() + 0.3 * kl + 0.5 * found.delta.norm() / found.h0.norm() ** 2
    assert found.steps_taken == 2
    assert found.loss == pytest.approx(expected.item(), rel=1e-6)


def test_loss_averages_tokens_within_a_context_and_then_contexts():
    model, tokenizer = tiny_model("gpt_neox"), tiny_tokenizer("sentencepiece")
    per_context = []
    for context in CONTEXTS:
        prompt = context.replace("{}", "The capital of France is")
        ids = tokenizer(prompt + " Danielle")["input_ids"]
        count = len(ids) - len(tokenizer(prompt)["input_ids"])
        log_p = model(torch.tensor([ids])).logits[0, -count - 1 : -1].log_softmax(-1)
        per_context.append(-log_p.gather(-1, torch.tensor(ids[-count:])[:, None]).mean())
        assert count > 1
    request = REQUESTS[0]._replace(target="Danielle")
    found = values(model, tokenizer, *request, CONTEXTS, layer=1, site="block", steps=1)
    assert found.loss == pytest.approx(torch.stack(per_context).mean().item(), rel=1e-5)


def test_values_stop_below_the_threshold_before_a_step():
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer("bytelevel")
    request = Request("The capital of {}", "France", "the")
    run = partial(values, model, tokenizer, *request, CONTEXTS, layer=1, site="block", steps=20, clamp_norm_factor=4)
    full = run()
    early = run(loss_threshold=full.loss + 1.0)
    assert full.steps_taken == 19
    assert 0 < early.steps_taken < 19
    assert early.loss < full.loss + 1.0 <= run(steps=early.steps_taken).loss
    assert run(loss_threshold=1e9).steps_taken == 0


def test_delta_is_kept_within_the_clamp():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("bytelevel-bos")
    found = values(model, tokenizer, *REQUESTS[0], CONTEXTS, layer=1, site="mlp", steps=5, clamp_norm_factor=0.1)
    assert found.delta.norm() == pytest.approx(0.1 * found.h0.norm().item(), rel=1e-5)


def test_kl_row_ignores_the_tokens_after_the_subject(monkeypatch):
    model, tokenizer = tiny_model("llama", dtype=torch.float64), tiny_tokenizer("sentencepiece")
    run = partial(values, model, tokenizer, *REQUESTS[0], CONTEXTS, layer=1, site="block", kl_factor=5.0)
    expected, without = run(), run(kl_factor=0.0)
    monkeypatch.setattr(reference, "KL_PROMPT", "{} wondered what the university would say about it")
    torch.testing.assert_close(run().target, expected.target, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(without.target, expected.target, atol=1e-2)


def test_keys_average_by_type_or_plainly():
    model, tokenizer = tiny_model("opt"), tiny_tokenizer("bytelevel")
    bare, first, second = (published_keys(model, tokenizer, REQUESTS, [context], 2, "plain") for context in CONTEXTS)
    read = partial(published_keys, model, tokenizer, REQUESTS, CONTEXTS, 2)
    torch.testing.assert_close(read("plain"), (bare + first + second) / 3)
    torch.testing.assert_close(read("type"), bare / 2 + (first + second) / 4)
    assert bare.shape == (80, len(REQUESTS))


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_rome_makes_the_key_give_the_value(model_type):
    model, tokenizer = tiny_model(model_type, dtype=torch.float64), tiny_tokenizer("sentencepiece")
    value = torch.randn(32, dtype=torch.float64)
    change = published_rome(model, tokenizer, REQUESTS[0], CONTEXTS, value, 2, covariance(80))
    key = published_keys(model, tokenizer, [REQUESTS[0]], CONTEXTS, 2, "plain")[:, 0]
    assert torch.linalg.matrix_rank(change) == 1
    write(model, {2: change})
    torch.testing.assert_close(mlp_output_matrix(model, 2)(key).detach(), value, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("layers", [[2], [1, 2]])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "falcon"])
def test_memit_with_little_preservation_reaches_the_targets(model_type, layers):
    """With bare prompts only and λ near 0 the last layer's solve is exact: block L then gives z itself."""
    model, tokenizer = tiny_model(model_type, dtype=torch.float64), tiny_tokenizer("sentencepiece")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    zs = torch.randn(len(REQUESTS), 32, dtype=torch.float64)
    covariances = {layer: covariance(80) for layer in layers}
    changes = published_memit(model, tokenizer, REQUESTS, ["{}"], zs, layers, covariances, lam=1e-9)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    write(model, changes)
    for request, z in zip(REQUESTS, zs, strict=True):
        reached = reference._read(model, tokenizer, request, "{}", block(model, layers[-1]), "output")
        torch.testing.assert_close(reached, z, atol=1e-5, rtol=1e-5)


def test_memit_minimises_its_objective_and_spreads_the_residual():
    """At layer l, ΔW minimises ||ΔW K - R||² + λ tr(ΔW C ΔWᵀ) with R the L - l + 1-th part of z - h_L."""
    model, tokenizer = tiny_model("llama", dtype=torch.float64), tiny_tokenizer("sentencepiece")
    zs = torch.randn(len(REQUESTS), 32, dtype=torch.float64)
    covariances = {layer: covariance(80) for layer in (0, 1, 2)}
    changes = published_memit(model, tokenizer, REQUESTS, CONTEXTS, zs, [0, 1, 2], covariances, lam=50.0)
    for layer, parts in ((0, 3), (1, 2), (2, 1)):
        keys = published_keys(model, tokenizer, REQUESTS, CONTEXTS, layer, "type")
        reached = [reference._read(model, tokenizer, r, "{}", block(model, 2), "output") for r in REQUESTS]
        residual = (zs.T - torch.stack(reached, dim=1)) / parts
        change = changes[layer]
        gradient = (change @ keys - residual) @ keys.T + 50.0 * change @ covariances[layer]
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)
        write(model, {layer: change})
