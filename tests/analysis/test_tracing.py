import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

import lightedit as le
from benchmarks.published.tracing import traced as published_trace
from benchmarks.published.tracing import window_modules
from lightedit.analysis import tracing
from lightedit.analysis.averages import mean_of
from lightedit.analysis.figures import drawings, save_figures
from lightedit.analysis.noise import noise_level, noise_of
from lightedit.analysis.prompts import traced_prompts
from lightedit.errors import ArgumentError, MissingFileError
from lightedit.lm import Place
from tests.analysis.traces import KNOWN, LAYERS, UNKNOWN, knowing_model, made_up, made_up_trace
from tests.models import tiny_model, tiny_tokenizer

SETTINGS = le.TraceSettings(samples=2, window=2, noise_level=0.5, progress_bar=False)
COLUMNS = ["fact", "kind", "layer", "position", "token", "token_class", "p_clean", "p_corrupted", "p_restored",
           "indirect_effect"]  # fmt: skip


@pytest.fixture(scope="module")
def lm() -> le.LanguageModel:
    return knowing_model()


@pytest.fixture(scope="module")
def found(lm: le.LanguageModel) -> le.Trace:
    return le.trace(lm, KNOWN, settings=SETTINGS)


def with_settings(**changed: object) -> le.TraceSettings:
    return le.TraceSettings(**{"samples": 2, "window": 2, "noise_level": 0.5, "progress_bar": False, **changed})


def test_tokens_before_the_subject_have_no_effect(found: le.Trace) -> None:
    fact = found.facts[0]
    assert fact.subject[0] == 4  # The capital of the
    for kind in ("state", "mlp", "attention"):
        assert list(fact.p_restored[kind]) == list(range(len(fact.tokens)))
        assert all(fact.effects(kind, position) == [0.0] * LAYERS for position in range(4))
        assert any(abs(effect) > 1e-4 for effect in fact.effects(kind, 4))


def test_the_last_state_restores_the_clean_probability(found: le.Trace) -> None:
    for fact in found.facts:
        assert fact.p_restored["state"][len(fact.tokens) - 1][-1] == pytest.approx(fact.p_clean, abs=1e-6)
        assert abs(fact.total_effect) > 1e-4


def test_severed_paths_are_traced_at_the_last_subject_token_alone(found: le.Trace) -> None:
    fact = found.facts[0]
    assert list(fact.p_restored["mlp severed"]) == list(fact.p_restored["attention severed"]) == [fact.subject[1] - 1]
    last = LAYERS - 1  # behind the last layer, no path is left to sever
    position = fact.subject[1] - 1
    assert fact.p_restored["mlp severed"][position][last] == pytest.approx(fact.p_restored["state"][position][last])


def test_the_last_subject_token_alone_has_the_effects_that_it_has_among_all(
    lm: le.LanguageModel, found: le.Trace
) -> None:
    alone = le.trace(lm, KNOWN, settings=with_settings(tokens="last subject"))
    for one, whole in zip(alone.facts, found.facts, strict=True):
        (position,) = one.p_restored["state"]
        assert position == one.subject[1] - 1
        assert one.p_restored["mlp"][position] == pytest.approx(whole.p_restored["mlp"][position], abs=1e-6)


def test_unknown_facts_are_left_out_with_a_message(
    lm: le.LanguageModel, found: le.Trace, capsys: pytest.CaptureFixture[str]
) -> None:
    some = le.trace(lm, [UNKNOWN, KNOWN[1]], settings=SETTINGS)
    assert [fact.fact for fact in some.facts] == [KNOWN[1].text] and some.left_out == (UNKNOWN.text,)
    assert "1 of 2 facts are traced" in capsys.readouterr().err
    # its noise is its own, whatever the other facts are
    assert some.facts[0].p_corrupted == pytest.approx(found.facts[1].p_corrupted, abs=1e-7)


def test_unknown_facts_can_be_traced_by_what_the_model_says(lm: le.LanguageModel) -> None:
    traced = le.trace(lm, [UNKNOWN], settings=with_settings(only_known=False, kinds=("state",), severed=False))
    said = lm.generate([UNKNOWN.text], 1, stop_at_end=False)[0]
    assert traced.facts[0].answer == lm.continuation(lm.encode([UNKNOWN.text])[0], said)


def test_a_joint_probability_is_the_product_over_the_answers_tokens(lm: le.LanguageModel) -> None:
    fact = le.Fact("The song of the {} was", "radio", "city of the")
    traced = le.trace(lm, [fact], settings=with_settings(answer="joint", only_known=False, kinds=("state",)))
    ids = lm.encode([f"{fact.text} {fact.target_new}"])[0]
    length = len(lm.encode([fact.text])[0])
    with torch.no_grad():
        log_p = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    expected = math.exp(sum(float(log_p[i - 1, ids[i]]) for i in range(length, len(ids))))
    assert len(ids) - length > 2
    assert traced.facts[0].p_clean == pytest.approx(expected, rel=1e-4)
    assert traced.facts[0].answer == f" {fact.target_new}"


def test_the_true_target_is_what_is_explained_where_there_is_one(lm: le.LanguageModel) -> None:
    fact = le.Fact(KNOWN[1].prompt, KNOWN[1].subject, "London", target_true="the")
    assert le.trace(lm, [fact], settings=SETTINGS).facts[0].answer == " the"


def test_the_noise_level_is_three_deviations_of_the_subjects_embeddings(lm: le.LanguageModel) -> None:
    prompts = traced_prompts(lm, KNOWN)
    rows = [lm.model.model.embed_tokens.weight[prompt.ids[i]] for prompt in prompts for i in prompt.subject]
    expected = 3 * float(torch.stack(rows).double().std())
    assert noise_level(lm, prompts, le.TraceSettings()) == pytest.approx(expected)
    assert noise_level(lm, prompts, le.TraceSettings(noise_level=0.1)) == 0.1


@pytest.mark.parametrize(("distribution", "deviation"), [("normal", 1.0), ("uniform", 3**-0.5), ("student", 3**0.5)])
def test_noise_has_the_deviation_of_its_distribution(lm: le.LanguageModel, distribution: str, deviation: float) -> None:
    (prompt,) = traced_prompts(lm, KNOWN[:1])
    noise = noise_of(prompt, 32, 2.0, with_settings(samples=4000, distribution=distribution))
    assert float(noise.std()) == pytest.approx(2 * deviation, rel=0.01 if distribution != "student" else 0.2)
    if distribution == "uniform":
        assert float(noise.abs().max()) <= 2


def test_published_noise_is_that_of_numpy_with_seed_one_for_every_fact(lm: le.LanguageModel) -> None:
    first, _, third = traced_prompts(lm, KNOWN)
    settings = with_settings(published=True)
    expected = 0.5 * numpy.random.RandomState(1).randn(2, len(first.subject), 32)
    numpy.testing.assert_allclose(noise_of(first, 32, 0.5, settings), expected, rtol=1e-6)
    assert not torch.equal(noise_of(first, 32, 0.5, SETTINGS)[:, :1], noise_of(third, 32, 0.5, SETTINGS)[:, :1])


def test_replaced_embeddings_do_not_depend_on_the_subject(lm: le.LanguageModel) -> None:
    (prompt,) = traced_prompts(lm, KNOWN[:1])
    level = noise_level(lm, [prompt], SETTINGS)
    noise = noise_of(prompt, 32, level, SETTINGS)
    runs = tracing.run_clean_and_corrupted(lm, prompt, noise, [], replace=True)
    with lm.capture([Place(0, "embedding")], 1), torch.no_grad():
        embedded = lm.model.model.embed_tokens(torch.tensor([prompt.ids] * 2))
        embedded[:, prompt.subject.start : prompt.subject.stop] = noise
        logits = lm.model(inputs_embeds=embedded).logits[:, list(prompt.reads)]
    expected = logits.log_softmax(-1).gather(2, torch.tensor(prompt.targets).expand(2, -1)[..., None]).sum((1, 2)).exp()
    torch.testing.assert_close(runs.p_corrupted, expected, atol=1e-6, rtol=1e-4)


# Averages


def test_a_token_belongs_to_one_class(lm: le.LanguageModel) -> None:
    (prompt,) = traced_prompts(lm, [le.Fact("In {} was a song", "the city of the state", "the")])
    classes = [prompt.token_class(i) for i in range(prompt.length)]
    assert prompt.tokens[prompt.subject.start] == "the"
    assert classes[0] == "before subject" and classes[-1] == "last"
    assert classes[prompt.subject.start] == "first subject" and classes[prompt.subject.stop - 1] == "last subject"
    assert classes[prompt.subject.stop] == "first after" and classes[prompt.subject.stop + 1] == "further"
    (one_token,) = traced_prompts(lm, [le.Fact("In the {}", "city", "the")])
    assert one_token.token_class(one_token.length - 1) == "last"


def test_averages_are_means_over_facts_of_means_over_tokens() -> None:
    averages = made_up_trace(3).averages("state")
    assert list(averages) == ["first subject", "middle subject", "last subject", "first after", "last", "any"]
    # effects 0.1 t + 0.01 l, shifted by 0, 0.05 and 0.1
    assert averages["middle subject"][1].value == pytest.approx(0.25 + 0.01 + 0.05)
    assert averages["any"][0].value == pytest.approx(0.6 + 0.05)
    assert averages["last subject"][0].half_width == pytest.approx(1.96 * 0.05 / math.sqrt(3))
    assert averages["last"][0].facts == 3


def test_published_averages_count_tokens() -> None:
    published = le.Trace("tiny", 2, 0.35, le.TraceSettings(published=True), (made_up(), made_up(shift=0.3)))
    averages = published.averages("state")
    assert averages["middle subject"][0].facts == 4
    one_token = replace(made_up(), subject=(5, 6))
    short = le.Trace("tiny", 2, 0.35, le.TraceSettings(published=True), (one_token,))
    averages = short.averages("state")
    assert averages["first subject"] == averages["last subject"]
    assert averages["first after"] == averages["last"]


def test_an_interval_is_that_of_the_mean() -> None:
    assert mean_of([0.0, 1.0]).value == 0.5
    assert mean_of([0.0, 1.0]).half_width == pytest.approx(1.96 * math.sqrt(0.5) / math.sqrt(2))
    assert math.isnan(mean_of([1.0]).half_width)


def test_total_effects_are_averaged_over_facts() -> None:
    assert made_up_trace().total_effect.value == pytest.approx(0.8)
    assert "3 facts traced, 1 that the model does not know left out" in str(made_up_trace())


def test_a_trace_says_where_effects_are_largest() -> None:
    # effects 0.1 t + 0.01 l, shifted by 0, 0.05 and 0.1; the subject ends at token 4, the prompt at token 6
    width = 1.96 * 0.05 / math.sqrt(3)
    sites = f"last subject token 0.460 ± {width:.3f} at layer 1, last token 0.660 ± {width:.3f} at layer 1"
    assert f"state: largest average indirect effect of the {sites}" in str(made_up_trace(3)).splitlines()


# Files


def test_the_table_has_a_row_for_each_restoration(found: le.Trace, tmp_path: Path) -> None:
    found.save(tmp_path / "trace")
    with (tmp_path / "trace" / "trace.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    tokens = sum(len(fact.tokens) for fact in found.facts)
    assert len(rows) == LAYERS * (3 * tokens + 2 * len(found.facts))
    row = next(r for r in rows if r["kind"] == "mlp" and r["layer"] == "1" and r["position"] == "4")
    assert (row["fact"], row["token"], row["token_class"]) == (KNOWN[0].text, "ri", "first subject")
    assert float(row["indirect_effect"]) == pytest.approx(found.facts[0].effects("mlp", 4)[1])


def test_the_averages_are_a_table(tmp_path: Path) -> None:
    with (made_up_trace(3).save(tmp_path) / "averages.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "state"]
    assert len(rows) == 2 * 6
    (row,) = [row for row in rows if (row["token_class"], row["layer"]) == ("middle subject", "1")]
    assert float(row["indirect_effect"]) == pytest.approx(0.25 + 0.01 + 0.05) and row["facts"] == "3"
    assert float(row["half_width"]) == pytest.approx(1.96 * 0.05 / math.sqrt(3))
    with (made_up_trace(1).save(tmp_path) / "averages.csv").open(encoding="utf-8", newline="") as file:
        assert {row["half_width"] for row in csv.DictReader(file)} == {""}


def test_a_saved_trace_is_read_back_unchanged(found: le.Trace, tmp_path: Path) -> None:
    assert le.Trace.load(found.save(tmp_path)) == found


def test_a_damaged_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"trace\.json"):
        le.Trace.load(tmp_path)
    (tmp_path / "trace.json").write_text("{")
    with pytest.raises(ArgumentError, match="damaged"):
        le.Trace.load(tmp_path)


def test_an_interrupted_run_goes_on_after_the_facts_that_are_finished(
    lm: le.LanguageModel, found: le.Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = tracing.run_clean_and_corrupted
    traced: list[str] = []

    def stops_at_the_last(lm, prompt, *others):
        if prompt.fact == KNOWN[-1] and KNOWN[-1].text not in traced:
            traced.append(prompt.fact.text)
            raise KeyboardInterrupt
        traced.append(prompt.fact.text)
        return right(lm, prompt, *others)

    monkeypatch.setattr(tracing, "run_clean_and_corrupted", stops_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        le.trace(lm, KNOWN, settings=SETTINGS, checkpoint=tmp_path / "run")
    resumed = le.trace(lm, KNOWN, settings=SETTINGS, checkpoint=tmp_path / "run")
    assert traced == [*(fact.text for fact in KNOWN), KNOWN[-1].text]
    assert resumed == found


def test_a_checkpoint_of_other_settings_is_refused(lm: le.LanguageModel, tmp_path: Path) -> None:
    le.trace(lm, KNOWN[:1], settings=SETTINGS, checkpoint=tmp_path)
    with pytest.raises(le.ResumeError, match="samples"):
        le.trace(lm, KNOWN[:1], settings=with_settings(samples=3), checkpoint=tmp_path)


# Figures


def test_a_trace_has_these_figures_as_svg_and_png(tmp_path: Path) -> None:
    files = save_figures(made_up_trace(), tmp_path, facts=1)
    names = [f"{name}.{suffix}" for name in ("averages", "layers", "severed", "fact-1") for suffix in ("svg", "png")]
    assert [file.name for file in files] == names and all(file.stat().st_size > 1000 for file in files)
    text = (tmp_path / "fact-1.svg").read_text()
    assert "Tower*" in text and ">The<" in text and "Restored MLP, window 2" in text


def test_equal_traces_give_equal_figures(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_figures(made_up_trace(), tmp_path / name, facts=1)
    assert (tmp_path / "a/averages.svg").read_bytes() == (tmp_path / "b/averages.svg").read_bytes()


def test_figures_of_one_kind_and_one_token_are_drawn(lm: le.LanguageModel) -> None:
    settings = with_settings(kinds=("state",), tokens="last subject", severed=False)
    assert list(drawings(le.trace(lm, KNOWN[:1], settings=settings))) == ["layers"]


# Wrong input


def test_wrong_facts_are_refused_before_work(lm: le.LanguageModel) -> None:
    with pytest.raises(le.FactError, match="at least one fact"):
        le.trace(lm, [], settings=SETTINGS)
    with pytest.raises(le.FactError, match=r"fact 1: .*has no subject"):
        le.trace(lm, [KNOWN[0], le.Fact("The river is in", target_new="the")], settings=SETTINGS)
    with pytest.raises(le.FactError, match=r"fact 0: .*256 positions"):
        le.trace(lm, [le.Fact("the " * 300 + "{} is", "river", "the")], settings=SETTINGS)
    with pytest.raises(le.FactError, match="none of the 1 is known"):
        le.trace(lm, [UNKNOWN], settings=SETTINGS)


def test_a_window_larger_than_the_model_is_refused(lm: le.LanguageModel) -> None:
    with pytest.raises(ArgumentError, match=r"window: 10 layers, but .* has 3"):
        le.trace(lm, KNOWN)
    states = le.TraceSettings(samples=1, kinds=("state",), severed=False, progress_bar=False)
    assert le.trace(lm, KNOWN[:1], settings=states).facts


def test_a_model_with_other_layers_than_attention_has_states_and_mlps_traced() -> None:
    lm = le.LanguageModel(tiny_model("bamba", layers=2), tiny_tokenizer("bytelevel"))
    with pytest.raises(le.UnsupportedModelError, match="leave attention out of kinds, and set severed to False"):
        le.trace(lm, KNOWN, settings=SETTINGS)
    settings = with_settings(kinds=("state", "mlp"), severed=False, only_known=False)
    (traced,) = le.trace(lm, KNOWN[:1], settings=settings).facts
    (prompt,) = traced_prompts(lm, KNOWN[:1])
    said = lm.generate([prompt.ids], 1, stop_at_end=False)[0]
    prompt = prompt.explaining(said)
    noise = noise_of(prompt, 32, 0.5, settings)
    for kind, window in (("state", 1), ("mlp", 2)):
        for layer in range(2):
            modules = window_modules(lm.model, kind, layer, window, 2)
            places = [(5, module) for module in modules]
            expected = published_trace(lm.model, prompt.ids, said, prompt.subject, noise, places)
            assert traced.p_restored[kind][5][layer] == pytest.approx(float(expected.mean()), abs=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samples": 0}, "samples"),
        ({"window": 0}, "window"),
        ({"noise": -1.0}, "noise"),
        ({"noise_level": math.nan}, "noise_level"),
        ({"kinds": ("mpl",)}, "mpl"),
        ({"kinds": ()}, "kinds"),
        ({"distribution": "gauss"}, "gauss"),
        ({"tokens": "first"}, "first"),
        ({"answer": "all"}, "all"),
        ({"tokens_per_pass": 0}, "tokens_per_pass"),
    ],
)
def test_settings_out_of_range_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        le.TraceSettings(**changed)


def test_swapped_arguments_are_named(lm: le.LanguageModel) -> None:
    with pytest.raises(TypeError, match="language model comes first"):
        le.trace(KNOWN, lm)  # type: ignore[arg-type]
