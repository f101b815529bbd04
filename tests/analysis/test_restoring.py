import pytest
import torch

import lightedit as le
from benchmarks.published.tracing import outputs, part, traced, window_modules
from lightedit.analysis.clean_and_corrupted import run_clean_and_corrupted
from lightedit.analysis.prompts import TracedPrompt, traced_prompts
from lightedit.analysis.restoring import Branch, restored, state_branches, window_branches
from lightedit.lm import Place
from tests.models import ARCHITECTURES, tiny_model, tiny_tokenizer

FACT = le.Fact("The capital of the {} is in", "river", "of the")
SUBJECT_FIRST = le.Fact("{} is in", "The river", "Rome")
LAYERS, SAMPLES = 3, 2


def a_prompt(lm: le.LanguageModel, fact: le.Fact = FACT, answer: int = 1) -> TracedPrompt:
    """The prompt with what the model itself says, in so many tokens: its probability is far from zero."""
    (prompt,) = traced_prompts(lm, [fact])
    (said,) = lm.generate([prompt.ids[: prompt.length]], answer, stop_at_end=False)
    return prompt.explaining(said)


def noise_for(lm: le.LanguageModel, prompt: TracedPrompt) -> torch.Tensor:
    return torch.randn(SAMPLES, len(prompt.subject), lm.d_model) * 0.5


@pytest.mark.parametrize(
    ("fact", "answer"), [(FACT, 2), (SUBJECT_FIRST, 1)], ids=["subject in the middle", "subject first"]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batched_restorations_equal_one_pass_for_each(architecture: str, fact: le.Fact, answer: int) -> None:
    lm = le.LanguageModel(tiny_model(architecture, layers=LAYERS), tiny_tokenizer("bytelevel"))
    prompt = a_prompt(lm, fact, answer)
    noise = noise_for(lm, prompt)
    plain = (lm.model, prompt.ids, prompt.targets, prompt.subject, noise)
    runs = run_clean_and_corrupted(lm, prompt, noise, ["mlp", "attention"])
    assert runs.p_clean == pytest.approx(float(traced(*plain[:4], 0 * noise, [])[0]), abs=1e-5)
    torch.testing.assert_close(runs.p_corrupted, traced(*plain, []), atol=1e-5, rtol=0)
    positions = range(prompt.subject[0], prompt.length)
    found = {
        "state": restored(lm, runs, state_branches(runs, LAYERS), positions, max_tokens=40),
        "mlp": restored(lm, runs, window_branches(lm, runs, "mlp", 3), positions, max_tokens=200),
        "attention": restored(lm, runs, window_branches(lm, runs, "attention", 2), positions, max_tokens=10_000),
    }
    for kind, window in (("state", 1), ("mlp", 3), ("attention", 2)):
        for layer in range(LAYERS):
            modules = window_modules(lm.model, kind, layer, window, LAYERS)
            for index, position in enumerate(positions):
                expected = traced(*plain, [(position, module) for module in modules])
                torch.testing.assert_close(found[kind][layer, index], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("severed", ["mlp", "attention"])
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gemma2"])
def test_severed_paths_stay_as_in_the_corrupted_run(architecture: str, severed: str) -> None:
    lm = le.LanguageModel(tiny_model(architecture, layers=LAYERS), tiny_tokenizer("bytelevel"))
    prompt = a_prompt(lm)
    noise = noise_for(lm, prompt)
    runs = run_clean_and_corrupted(lm, prompt, noise, ["mlp", "attention"])
    positions = range(prompt.subject[0], prompt.length)
    found = restored(lm, runs, state_branches(runs, LAYERS, severed), positions, max_tokens=1000)
    whole = restored(lm, runs, state_branches(runs, LAYERS), positions, max_tokens=1000)
    assert float((found - whole).abs().max()) > 2e-5
    corrupted = outputs(lm.model, prompt.ids, prompt.subject, noise, severed)
    for layer in range(LAYERS):
        for index, position in enumerate(positions):
            # where the state is restored, paths of the layers up to it act on nothing
            held = [
                (position, part(lm.model, severed, other), corrupted[other][:, position]) for other in range(LAYERS)
            ]
            expected = traced(
                *(lm.model, prompt.ids, prompt.targets, prompt.subject, noise),
                [],
                [*held, (position, part(lm.model, "state", layer), clean_states(lm, prompt, layer, position))],
            )
            torch.testing.assert_close(found[layer, index], expected, atol=1e-6, rtol=1e-5)


def clean_states(lm: le.LanguageModel, prompt: TracedPrompt, layer: int, position: int) -> torch.Tensor:
    none = torch.zeros(SAMPLES, len(prompt.subject), lm.d_model)
    return outputs(lm.model, prompt.ids, prompt.subject, none, "state")[layer][:, position]


@pytest.fixture
def lm() -> le.LanguageModel:
    return le.LanguageModel(tiny_model("llama", layers=LAYERS), tiny_tokenizer("bytelevel"))


def test_what_restores_all_gives_the_clean_probability(lm: le.LanguageModel) -> None:
    prompt = a_prompt(lm)
    runs = run_clean_and_corrupted(lm, prompt, noise_for(lm, prompt), [])
    last = restored(lm, runs, state_branches(runs, LAYERS), [prompt.length - 1], 1000)[-1]
    assert runs.p_clean != pytest.approx(float(runs.p_corrupted.mean()), abs=1e-4)
    torch.testing.assert_close(last, torch.full_like(last, runs.p_clean), atol=1e-6, rtol=0)


def test_what_restores_nothing_gives_the_corrupted_probability(lm: le.LanguageModel) -> None:
    prompt = a_prompt(lm)
    runs = run_clean_and_corrupted(lm, prompt, noise_for(lm, prompt), [])
    branches = [Branch(layer, runs.corrupted[Place(layer, "block")], {}) for layer in range(LAYERS)]
    found = restored(lm, runs, branches, range(prompt.subject[0], prompt.length), 1000)
    torch.testing.assert_close(found, runs.p_corrupted.expand_as(found), atol=1e-6, rtol=0)


def test_a_state_that_the_answer_does_not_read_has_no_effect(lm: le.LanguageModel) -> None:
    prompt = a_prompt(lm)
    runs = run_clean_and_corrupted(lm, prompt, noise_for(lm, prompt), [])
    before_last = range(prompt.subject[0], prompt.length - 1)
    found = restored(lm, runs, state_branches(runs, LAYERS), before_last, 1000)[-1]
    torch.testing.assert_close(found, runs.p_corrupted.expand_as(found), atol=1e-6, rtol=0)


def test_the_size_of_a_pass_changes_nothing(lm: le.LanguageModel) -> None:
    prompt = a_prompt(lm, answer=3)
    runs = run_clean_and_corrupted(lm, prompt, noise_for(lm, prompt), ["mlp"])
    branches = [*state_branches(runs, LAYERS), *window_branches(lm, runs, "mlp", 2)]
    positions = range(prompt.subject[0], prompt.length)
    torch.testing.assert_close(
        restored(lm, runs, branches, positions, 1), restored(lm, runs, branches, positions, 10_000), atol=1e-6, rtol=0
    )


def test_the_clean_run_with_noise_of_nothing_is_the_corrupted_one(lm: le.LanguageModel) -> None:
    prompt = a_prompt(lm)
    runs = run_clean_and_corrupted(lm, prompt, 0 * noise_for(lm, prompt), [])
    torch.testing.assert_close(runs.p_corrupted, torch.full_like(runs.p_corrupted, runs.p_clean), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_restorations_in_a_real_model_equal_one_pass_for_each() -> None:
    lm = le.LanguageModel.load("smollm2", dtype="float32", device="cpu")
    (prompt,) = traced_prompts(lm, [le.Fact("The mother tongue of {} is", "Danielle Darrieux", "French")])
    prompt = prompt.explaining(prompt.targets[:1])
    noise = 0.35 * torch.randn(2, len(prompt.subject), lm.d_model)
    plain = (lm.model, prompt.ids, prompt.targets, prompt.subject, noise)
    runs = run_clean_and_corrupted(lm, prompt, noise, ["mlp", "attention"])
    torch.testing.assert_close(runs.p_corrupted, traced(*plain, []), atol=1e-4, rtol=0)
    assert runs.p_clean > float(runs.p_corrupted.mean()) + 0.05
    positions, layers = [prompt.subject[-1], prompt.length - 1], [0, 4, 16, 28]
    branches = {
        "state": state_branches(runs, lm.n_layers),
        "mlp": window_branches(lm, runs, "mlp", 10),
        "attention": window_branches(lm, runs, "attention", 10),
    }
    for kind, own in branches.items():
        found = restored(lm, runs, [own[layer] for layer in layers], positions, max_tokens=1000)
        for number, layer in enumerate(layers):
            modules = window_modules(lm.model, kind, layer, 1 if kind == "state" else 10, lm.n_layers)
            for index, position in enumerate(positions):
                expected = traced(*plain, [(position, module) for module in modules])
                torch.testing.assert_close(found[number, index], expected, atol=1e-4, rtol=0)
