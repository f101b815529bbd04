"""A localisation study of a tiny model, against plain computations of each edit."""

import csv
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import lightedit as le
from benchmarks.values import published_value
from lightedit.analysis.localization import study as at_work
from lightedit.analysis.localization.facts import edited_fact
from lightedit.analysis.localization.methods import placed
from lightedit.analysis.localization.noised import NoisedSubjects
from lightedit.analysis.noise import drawn, noise_of
from lightedit.analysis.prompts import traced_prompts
from lightedit.data.prompts import Contexts, tokenize_facts
from lightedit.errors import ArgumentError, ArgumentTypeError, MissingFileError
from lightedit.lm import Place
from lightedit.methods.closed_form.keys import keys_at
from lightedit.methods.closed_form.values import optimize_values
from lightedit.methods.finetuning.editor import FineTuningEditor
from tests.analysis.localization.studies import (
    FACTS,
    LAYER_NUMBERS,
    METHODS,
    SETTINGS,
    UNKNOWN,
    knowing,
    with_settings,
)
from tests.runs import assert_unedited, covariance_of, state
from tests.toy import GradientStep

PROBLEMS = ("injection", "reversal", "erasure", "amplification", "forcing")
QUIET = le.RunSettings(outcomes=False, progress_bar=False)


@pytest.fixture(scope="module")
def lm() -> le.LanguageModel:
    return knowing()


@pytest.fixture(scope="module")
def covariance(lm: le.LanguageModel) -> le.Covariance:
    return covariance_of(lm, LAYER_NUMBERS)


@pytest.fixture(scope="module")
def found(lm: le.LanguageModel, covariance: le.Covariance) -> le.LocalizationStudy:
    weights = state(lm)
    study = le.localization_study(
        lm, [FACTS[0], UNKNOWN, *FACTS[1:]], METHODS, covariance=covariance, settings=SETTINGS
    )
    assert_unedited(lm, weights)
    return study


def joint_probability(
    lm: le.LanguageModel, prompt: str, answer: str, noise: torch.Tensor | None = None, at=()
) -> float:
    """The mean over draws of noise of the answer's joint probability, by the stock model."""
    before, ids = lm.encode([prompt])[0], lm.encode([prompt + answer])[0]
    with torch.no_grad():
        embedded = lm.model.model.embed_tokens(torch.tensor([ids] * (1 if noise is None else len(noise))))
        if noise is not None:
            embedded[:, list(at)] += noise
        logs = lm.model(inputs_embeds=embedded).logits.double().log_softmax(-1)
    total = sum(logs[:, i - 1, ids[i]] for i in range(len(before), len(ids)))
    return float(total.exp().mean())


def perplexity(lm: le.LanguageModel, ids: list[int]) -> float:
    with torch.no_grad():
        logs = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return math.exp(-sum(float(logs[i - 1, ids[i]]) for i in range(1, len(ids))) / (len(ids) - 1))


@contextmanager
def edited(
    lm: le.LanguageModel, fact: le.Fact, method: le.Method, covariance: le.Covariance | None = None
) -> Iterator[None]:
    edit = le.edit(lm, [fact], method, covariance=covariance, settings=QUIET)
    try:
        yield
    finally:
        edit.revert(lm)


def test_every_problem_method_layer_and_known_fact_has_a_cell(found: le.LocalizationStudy) -> None:
    assert found.left_out == (UNKNOWN.text,) and [fact.fact for fact in found.facts] == [fact.text for fact in FACTS]
    expected = {
        (fact, problem, method, layer)
        for fact in range(3) for problem in PROBLEMS for method in METHODS for layer in LAYER_NUMBERS
    }  # fmt: skip
    assert {(cell.fact, cell.problem, cell.method, cell.layer) for cell in found.cells} == expected
    assert len(found.cells) == len(expected)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("problem", PROBLEMS[:4])
def test_a_cell_is_the_single_edit_that_is_made_scored_and_taken_back(
    lm: le.LanguageModel, covariance: le.Covariance, found: le.LocalizationStudy, name: str, problem: str
) -> None:
    layer = 0 if problem == "injection" else 1
    for index, fact in enumerate(FACTS[:2]):
        prepared = found.facts[index]
        target = {"injection": fact.target_new, "reversal": prepared.said_under_noise}.get(problem, "the")
        gap = prepared.before_said if problem == "reversal" else " "
        (cell,) = [c for c in found.of(problem, name) if (c.fact, c.layer) == (index, layer)]
        method = placed(METHODS[name], lm, layer)
        method = method.erasing() if problem == "erasure" else method

        def measured(target: str = gap + target, fact: le.Fact = fact, texts=prepared.texts) -> tuple[float, ...]:
            prompts = (fact.text, fact.paraphrase_prompts[0], fact.neighborhood_prompts[0])
            own = [joint_probability(lm, prompt, target) for prompt in prompts]
            return (*own, sum(perplexity(lm, list(text)) for text in texts) / len(texts))

        assert (cell.before.rewrite, cell.before.paraphrase, cell.before.neighborhood, cell.before.perplexity) == (
            pytest.approx(measured(), rel=1e-3, abs=0)
        )
        with edited(lm, edited_fact(problem, fact, prepared), method, covariance):
            assert (cell.after.rewrite, cell.after.paraphrase, cell.after.neighborhood, cell.after.perplexity) == (
                pytest.approx(measured(), rel=5e-3, abs=0)
            )
        assert cell.after.rewrite != pytest.approx(cell.before.rewrite, rel=1e-2, abs=0)


def test_edits_move_probabilities_where_the_problem_wants_them(found: le.LocalizationStudy) -> None:
    for cell in found.cells:
        if cell.method == "ROME" and cell.layer == 0:
            lower = cell.problem == "erasure"
            assert (cell.after.rewrite < cell.before.rewrite) == lower, cell


def test_windows_are_centred_and_cut_at_the_edges(lm: le.LanguageModel) -> None:
    memit = le.MEMIT(layers=(0, 1, 2))
    assert [placed(memit, lm, layer).layers for layer in LAYER_NUMBERS] == [(0, 1), (0, 1, 2), (1, 2)]
    assert placed(METHODS["ROME"], lm, 2).layers == (2,)


# Facts before they are edited


def test_the_true_answers_probability_decides_who_is_studied(lm: le.LanguageModel, found: le.LocalizationStudy) -> None:
    for fact in found.facts:
        assert fact.answer == "the"
        assert fact.probability == pytest.approx(joint_probability(lm, fact.fact, " the"), rel=1e-4)
    prepared = [fact.probability for fact in found.facts]
    assert min(prepared) > 0


def test_tracing_effects_are_those_of_trace(lm: le.LanguageModel, found: le.LocalizationStudy) -> None:
    for window in SETTINGS.windows:
        settings = le.TraceSettings(
            samples=2, noise_level=0.5, window=window, kinds=("mlp",), answer="joint", only_known=False,
            severed=False, progress_bar=False,
        )  # fmt: skip
        for fact, traced in zip(found.facts, le.trace(lm, FACTS, settings=settings).facts, strict=True):
            by_token = [traced.effects("mlp", t) for t in range(traced.subject[0], len(traced.tokens))]
            largest = [max(0.0, *column) / abs(traced.total_effect) for column in zip(*by_token, strict=True)]
            assert fact.effects[window] == pytest.approx([min(1.0, share) for share in largest], abs=1e-5)
    assert any(0 < effect < 1 for fact in found.facts for effect in fact.effects[1])


def test_reversal_asks_for_what_the_model_says_on_average_over_the_noise(
    lm: le.LanguageModel, found: le.LocalizationStudy
) -> None:
    for fact, prompt in zip(found.facts, traced_prompts(lm, FACTS), strict=True):
        ids = prompt.ids[: prompt.length]
        with torch.no_grad():
            embedded = lm.model.model.embed_tokens(torch.tensor([ids] * 2))
            embedded[:, list(prompt.subject)] += noise_of(prompt, lm.d_model, 0.5, SETTINGS.tracing(1))
            p = lm.model(inputs_embeds=embedded).logits[:, -1].softmax(-1).mean(0)
        likely = [lm.continuation(ids, [token]) for token in p.topk(5).indices.tolist()]
        said = fact.before_said + fact.said_under_noise
        assert said == next(text for text in likely if text.strip() and "\ufffd" not in text)


def test_essence_texts_begin_with_the_subject_and_are_no_longer_than_asked(
    lm: le.LanguageModel, found: le.LocalizationStudy
) -> None:
    for fact, prepared in zip(FACTS, found.facts, strict=True):
        begin = lm.encode([f"{fact.subject} is a"])[0]
        assert len(prepared.texts) == 2
        for text in prepared.texts:
            assert list(text[: len(begin)]) == begin and len(begin) <= len(text) <= max(12, len(begin) + 1)
    assert any(prepared.texts[0] != prepared.texts[1] for prepared in found.facts)


# Forcing


def test_forcing_is_scored_under_the_noise_of_tracing(lm: le.LanguageModel, found: le.LocalizationStudy) -> None:
    settings = le.TraceSettings(samples=2, noise_level=0.5, kinds=("mlp",), window=1, answer="joint", only_known=False,
                                severed=False, progress_bar=False)  # fmt: skip
    for index, traced in enumerate(le.trace(lm, FACTS, settings=settings).facts):
        cells = [cell for cell in found.of("forcing", "ROME") if cell.fact == index]
        assert [cell.before.rewrite for cell in cells] == pytest.approx([traced.p_corrupted] * 3, rel=1e-4)
    with_paraphrase = found.of("forcing", "ROME")[0]
    text = FACTS[0].paraphrase_prompts[0]
    ids = lm.encode([text])[0]
    tokens = [lm.decode([token]) for token in ids]
    start = len(lm.encode(["I say that the"])[0])
    assert "".join(tokens[start : start + 3]).strip().startswith("river")
    count = len(traced_prompts(lm, FACTS[:1])[0].subject)
    noise = drawn(FACTS[0].text, (2, count, lm.d_model), 0.5, SETTINGS.tracing(1))
    expected = joint_probability(lm, text, " the", noise, range(start, start + count))
    assert with_paraphrase.before.paraphrase == pytest.approx(expected, rel=1e-4)
    assert with_paraphrase.before.neighborhood == pytest.approx(
        joint_probability(lm, FACTS[0].neighborhood_prompts[0], " the"), rel=1e-4
    )


@contextmanager
def noised_by_hand(lm: le.LanguageModel, noises: list[tuple[range, torch.Tensor]]) -> Iterator[None]:
    """The stock model with noise at the embeddings of some tokens of each row."""

    def add(_, __, output):
        changed = output.clone()
        for row, (tokens, noise) in enumerate(noises[: len(output)]):
            changed[row, tokens.start : tokens.stop] += noise
        return changed

    handle = lm.model.model.embed_tokens.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


CONTEXTS = Contexts(("{}", "The river is long. {}"), (0.5, 0.5))


@pytest.mark.parametrize("same_noise", [False, True])
def test_values_and_keys_of_forcing_are_found_with_noise_that_follows_the_subject_in_each_row(
    lm: le.LanguageModel, same_noise: bool
) -> None:
    settings = with_settings(same_noise=same_noise)
    values = le.ValueSettings(lr=0.3, steps=4, clamp_norm_factor=2.0)
    fact = edited_fact("forcing", FACTS[1], None)
    (prompts,) = tokenize_facts(lm.tokenizer, [fact], CONTEXTS)
    noises = []
    for number, row in enumerate((*prompts.rows, prompts.subject)):
        tokens = range(row.first, row.lookup + 1)
        assert lm.decode(row.ids[row.first : row.lookup + 1]).strip() == "The river"
        draws = drawn(fact.text, (2, len(tokens), lm.d_model), 0.5, settings.tracing(1, other=not same_noise))
        noises.append((tokens, draws[number % 2]))
    with noised_by_hand(lm, noises):
        expected = published_value(lm, fact, CONTEXTS, 1, "mlp", values)
    noised = NoisedSubjects(lm, settings, 0.5)
    served = noised.serving()(prompts)
    with noised.known():
        found = optimize_values(lm, [served], 1, "mlp", values)
        keys = keys_at(lm, [served], Place(1))
    plain = optimize_values(lm, [prompts], 1, "mlp", values)
    assert float((found.targets[0] - expected.target).norm() / expected.target.norm()) < 1e-5
    assert float((found.targets - plain.targets).norm() / plain.targets.norm()) > 1e-2
    rows = [row.ids[: row.lookup + 1] for row in prompts.rows]
    own = []
    for row, noise in zip(rows, noises, strict=False):
        with noised_by_hand(lm, [noise]), lm.capture([Place(1)], 1, inputs=True) as states, torch.no_grad():
            lm.model(torch.tensor([row]))
        own.append(states[Place(1)][0, -1])
    torch.testing.assert_close(keys[:, 0].float(), torch.stack(own).mean(0), rtol=1e-4, atol=1e-5)


# Many edits


def test_chunks_of_facts_give_the_same_scores(
    lm: le.LanguageModel, covariance: le.Covariance, found: le.LocalizationStudy
) -> None:
    settings = with_settings(facts_per_chunk=1, layers=(1,), problems=("erasure", "forcing"))
    alone = le.localization_study(lm, FACTS, METHODS, covariance=covariance, settings=settings)
    whole = {(cell.fact, cell.problem, cell.method): cell for cell in found.cells if cell.layer == 1}
    for cell in alone.cells:
        same = whole[cell.fact, cell.problem, cell.method]
        assert cell.before.rewrite == pytest.approx(same.before.rewrite, rel=1e-4)
        assert cell.after.rewrite == pytest.approx(same.after.rewrite, rel=1e-3)
    assert len(alone.cells) == 18


def test_no_more_facts_are_trained_at_once_than_fit_into_memory(
    lm: le.LanguageModel, found: le.LocalizationStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[int] = []
    separate = FineTuningEditor.separate
    monkeypatch.setattr(FineTuningEditor, "most_separate", 2)
    monkeypatch.setattr(FineTuningEditor, "separate", lambda self, x: (at_once.append(len(x)), separate(self, x))[1])
    settings = with_settings(facts_per_chunk=3, layers=(1,), problems=("injection", "erasure"))
    study = le.localization_study(lm, FACTS, {"FT": METHODS["FT"]}, settings=settings)
    whole = {(cell.fact, cell.problem): cell for cell in found.cells if (cell.method, cell.layer) == ("FT", 1)}
    assert at_once == [2, 1] * 2
    for cell in study.cells:
        assert cell.after.rewrite == pytest.approx(whole[cell.fact, cell.problem].after.rewrite, rel=1e-3)


@dataclass(frozen=True)
class Movable(GradientStep):
    """A method that is no locate-then-edit one, as fine-tuning: it writes each fact and takes it back."""

    def at(self, layers):
        return replace(self, layer=layers[0])


def test_another_kind_of_method_is_studied(lm: le.LanguageModel) -> None:
    settings = with_settings(problems=("injection", "amplification"), layers=(0, 2))
    weights = state(lm)
    study = le.localization_study(lm, FACTS, {"step": Movable(lr=0.1)}, settings=settings)
    assert_unedited(lm, weights)
    assert len(study.cells) == 12
    for cell in study.cells:
        fact = edited_fact(cell.problem, FACTS[cell.fact], None)
        with edited(lm, fact, Movable(layer=cell.layer, lr=0.1)):
            after = joint_probability(lm, fact.text, f" {fact.target_new}")
        assert cell.after.rewrite == pytest.approx(after, rel=1e-3)


# Files


def test_a_saved_study_is_read_back_unchanged_and_its_tables_have_these_columns(
    found: le.LocalizationStudy, tmp_path: Path
) -> None:
    assert le.LocalizationStudy.load(found.save(tmp_path)) == found
    with (tmp_path / "localization.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["fact", "problem", "method", "layer", "rewrite", "paraphrase", "neighborhood", "essence",
                             "overall", "tracing_effect"]  # fmt: skip
    assert len(rows) == len(found.cells)
    without = [row for row in rows if row["fact"] == FACTS[2].text]
    assert {row["paraphrase"] for row in without} == {row["overall"] for row in without} == {""}
    assert float(rows[0]["tracing_effect"]) == found.facts[0].effects[1][found.cells[0].layer]
    with (tmp_path / "effects.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == 3 * len(SETTINGS.windows) * len(LAYER_NUMBERS)


def test_a_study_says_where_editing_works_best(found: le.LocalizationStudy) -> None:
    text = str(found)
    assert "3 facts studied, 1 that the model does not know left out, 135 edits at layers 0, 1, 2" in text
    means = found.by_layer("injection", "ROME")
    best = max(means, key=lambda layer: means[layer].value)
    assert f"injection, ROME: rewrite score largest at layer {best}, {means[best]}" in text
    cells = [cell for cell in found.of("injection", "ROME") if cell.layer == best]
    assert means[best].value == pytest.approx(sum(found.scores(cell).rewrite for cell in cells) / 3)


def test_regressions_take_the_scores_and_effects_of_the_cells(found: le.LocalizationStudy) -> None:
    every = found.regressions()
    assert [(each.problem, each.method) for each in every] == [(p, m) for p in PROBLEMS for m in METHODS]
    assert all((each.edits, each.facts) == (9, 3) for each in every)
    assert {each.edits for each in found.regressions("paraphrase")} == {6}  # one fact has none


def test_a_damaged_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"localization\.json"):
        le.LocalizationStudy.load(tmp_path)
    (tmp_path / "localization.json").write_text("{")
    with pytest.raises(ArgumentError, match="damaged"):
        le.LocalizationStudy.load(tmp_path)


@pytest.mark.parametrize("stops_at", [1, 3, 7])
def test_an_interrupted_study_goes_on_after_the_parts_that_are_finished(
    lm: le.LanguageModel, covariance: le.Covariance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_at: int
) -> None:
    settings = with_settings(problems=("injection", "forcing"), layers=(0, 2))
    methods = {"ROME": METHODS["ROME"]}
    given = {"covariance": covariance, "settings": settings}
    whole = le.localization_study(lm, FACTS, methods, **given)
    calls: list[str] = []
    right = {"prepared": at_work.studied, "edited": at_work.search}

    def counted(name: str):
        def call(*arguments):
            calls.append(name)
            if len(calls) == stops_at:
                raise KeyboardInterrupt
            return right[name](*arguments)

        return call

    monkeypatch.setattr(at_work, "studied", counted("prepared"))
    monkeypatch.setattr(at_work, "search", counted("edited"))
    with pytest.raises(KeyboardInterrupt):
        le.localization_study(lm, FACTS, methods, checkpoint=tmp_path / "run", **given)
    resumed = le.localization_study(lm, FACTS, methods, checkpoint=tmp_path / "run", **given)
    assert len(calls) == 2 + 8 + 1  # each part once, and the interrupted one again
    assert resumed == whole
    with pytest.raises(le.ResumeError, match="seed"):
        le.localization_study(
            lm, FACTS, methods, covariance=covariance, settings=replace(settings, seed=1), checkpoint=tmp_path / "run"
        )


# Wrong input


def test_wrong_facts_are_refused_before_work(lm: le.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_work, "covariance_for", None)  # nothing is estimated

    def study(*facts: le.Fact, **changed: object) -> le.LocalizationStudy:
        return le.localization_study(lm, list(facts), METHODS, settings=with_settings(**changed))

    with pytest.raises(le.FactError, match="at least one fact"):
        study()
    with pytest.raises(le.FactError, match=r"fact 1: .*has no subject"):
        study(FACTS[0], le.Fact("The river is in", target_new="the"))
    with pytest.raises(le.FactError, match=r"fact 0: .*has no target_true"):
        study(le.Fact("{} is in", "The river", "the"))
    with pytest.raises(le.FactError, match="knows none of the 1"):
        study(UNKNOWN)
    with pytest.raises(le.FactError, match="knows none of the 3"):
        study(*FACTS, min_probability=0.9999)
    long = "the " * 300
    with pytest.raises(le.FactError, match=r"fact 0: .*256 positions"):
        study(le.Fact(long + "{} is", "river", "city", target_true="the"))
    with pytest.raises(le.FactError, match=r"fact 1: .*256 positions"):
        study(FACTS[0], replace(FACTS[0], paraphrase_prompts=(long + "river is",)))
    with pytest.raises(le.FactError, match=r"fact 0: .*too many"):
        study(*FACTS, essence_tokens=400)


def test_wrong_settings_and_methods_are_refused_before_work(lm: le.LanguageModel) -> None:
    def study(methods=METHODS, **changed: object) -> le.LocalizationStudy:
        return le.localization_study(lm, FACTS, methods, settings=with_settings(**changed))

    with pytest.raises(ArgumentError, match="layers 0 to 2"):
        study(layers=(1, 3))
    with pytest.raises(ArgumentError, match=r"windows: 5 layers, but .* has 3"):
        study(windows=(5, 1))
    for wrong in ({"layers": (2, 1)}, {"problems": ()}, {"problems": ("guess",)}, {"windows": (3,)}, {"samples": 0},
                  {"largest_effect": 0.0}, {"essence_tokens": 1}, {"min_probability": 1.0}, {"overall": "five"},
                  {"noise_level": -1.0}, {"facts_per_chunk": 0}):  # fmt: skip
        with pytest.raises(ArgumentError):
            with_settings(**wrong)
    with pytest.raises(ArgumentError, match="there is none"):
        study({})
    with pytest.raises(ArgumentTypeError, match="expected a Method, got a str"):
        study({"ROME": "ROME"})
    with pytest.raises(ArgumentError, match="GradientStep cannot be moved"):
        study({"step": GradientStep()})
    with pytest.raises(ArgumentError, match="Movable cannot erase facts"):
        study({"step": Movable()})
    with pytest.raises(ArgumentError, match="leave forcing out of problems"):
        study({"step": Movable()}, problems=("forcing",))
    with pytest.raises(le.CovarianceError, match=r"no .*2"):
        le.localization_study(lm, FACTS, METHODS, covariance=covariance_of(lm, (0, 1)), settings=SETTINGS)
