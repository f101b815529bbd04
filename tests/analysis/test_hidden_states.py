import csv
import math
from pathlib import Path

import pytest
import torch

import lightedit as le
from lightedit.analysis import hidden_states as module
from lightedit.analysis.hidden_figures import save_hidden_states_figure
from lightedit.analysis.similarities import Similarities
from lightedit.analysis.unembedding import jaccard, published_jaccard, top_tokens
from lightedit.errors import ArgumentError, MissingFileError, NumericalError
from lightedit.lm import Place
from lightedit.lm.batch import pad
from lightedit.runs.kept import KeptRecords
from tests.analysis.plain_hidden import PARALLEL, plain, published
from tests.models import ARCHITECTURES, tiny_model, tiny_tokenizer

LAYERS = 3
PROMPTS = ["The river", "The capital of the city was in", "In the state", "The mother tongue of the people is"]


def settings(**changed: object) -> le.HiddenStateSettings:
    return le.HiddenStateSettings(**{"top": 20, "progress_bar": False, **changed})


def a_model(architecture: str = "llama") -> le.LanguageModel:
    return le.LanguageModel(tiny_model(architecture, layers=LAYERS), tiny_tokenizer("bytelevel"))


@pytest.fixture(scope="module")
def lm() -> le.LanguageModel:
    return a_model()


@pytest.fixture(scope="module")
def found(lm: le.LanguageModel) -> le.HiddenStates:
    return le.hidden_states(lm, PROMPTS, settings=settings())


def assert_equal(prompt: Similarities, expected: dict[str, list[tuple[float, float]]], within: float = 1e-6) -> None:
    for part, by_layer in expected.items():
        assert prompt.cosine[part] == pytest.approx([cosine for cosine, _ in by_layer], abs=within)
        assert prompt.jaccard[part] == pytest.approx([common for _, common in by_layer], abs=1e-6)


# Right values

PASSES = {False: {2048: 1e-6}, True: {1: 1e-6, 2048: 1e-4}}
"""Whether it is Gemma -> tokens of a pass -> tolerance. The gain of 300 behind Gemma's tiny MLPs makes the roundings in
which passes of several prompts differ from those of one that much larger."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batched_similarities_equal_a_plain_loop_over_prompts(architecture: str) -> None:
    lm = a_model(architecture)
    expected = [plain(lm.model, lm.encode([text])[0], 20) for text in PROMPTS]
    for tokens, within in PASSES[architecture.startswith("gemma")].items():
        found = le.hidden_states(lm, PROMPTS, settings=settings(tokens_per_pass=tokens))
        assert found.parallel == (architecture in PARALLEL)
        assert [prompt.prompt for prompt in found.prompts] == PROMPTS
        for prompt, own in zip(found.prompts, expected, strict=True):
            assert_equal(prompt, own, within)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_published_similarities_equal_the_published_steps(architecture: str) -> None:
    lm = a_model(architecture)
    expected = [published(lm.model, lm.tokenizer, lm.encode([text])[0], 20) for text in PROMPTS[:2]]
    for tokens, within in PASSES[architecture.startswith("gemma")].items():
        found = le.hidden_states(lm, PROMPTS[:2], settings=settings(published=True, tokens_per_pass=tokens))
        for prompt, own in zip(found.prompts, expected, strict=True):
            assert_equal(prompt, own, within)


@pytest.mark.parametrize("architecture", ["gemma2", "olmo2", "llama", "gptj"])
def test_outputs_before_a_norm_and_the_blocks_input_are_options(architecture: str) -> None:
    lm = a_model(architecture)
    ids = lm.encode(PROMPTS[:1])[0]
    for chosen in ({"after_norm": False}, {"mlp_input": "block"}, {"after_norm": False, "mlp_input": "block"}):
        (prompt,) = le.hidden_states(lm, PROMPTS[:1], settings=settings(**chosen)).prompts
        expected = plain(lm.model, ids, 20, chosen.get("after_norm", True), "mlp_input" in chosen)
        assert_equal(prompt, expected)
    same = plain(lm.model, ids, 20, False, True) == plain(lm.model, ids, 20)
    assert same == (architecture == "gptj")  # parallel, and without such norms


def a_model_of_known_states() -> le.LanguageModel:
    """One layer with h = (3, 4, 0 ...), a = (4, 0, 3, 0 ...) and m = (2, 1, 0 ...); token i < 32 reads coordinate i."""
    model = tiny_model("gpt2", layers=1)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()[:32] = torch.eye(32)
        model.transformer.wpe.weight.zero_()[:, :2] = torch.tensor([3.0, 4.0])
        model.transformer.ln_f.weight.fill_(1)
        model.transformer.ln_f.bias.zero_()
        block = model.transformer.h[0]
        for matrix, state in ((block.attn.c_proj, [4.0, 0.0, 3.0]), (block.mlp.c_proj, [2.0, 1.0, 0.0])):
            matrix.weight.zero_()
            matrix.bias.zero_()[: len(state)] = torch.tensor(state)
    return le.LanguageModel(model, tiny_tokenizer("bytelevel"))


def test_cosine_and_jaccard_are_those_worked_out_by_hand() -> None:
    lm = a_model_of_known_states()
    assert lm.encode(["The river"])[0][-1] >= 32  # a token without an embedding
    (prompt,) = le.hidden_states(lm, ["The river"], settings=settings(top=2)).prompts
    assert prompt.cosine["attention"] == pytest.approx([12 / 25])  # (3, 4, 0) and (4, 0, 3)
    assert prompt.jaccard["attention"] == pytest.approx([1 / 3])  # tokens 0, 1 and 0, 2
    assert prompt.cosine["mlp"] == pytest.approx([18 / math.sqrt(74 * 5)])  # (7, 4, 3) and (2, 1, 0)
    assert prompt.jaccard["mlp"] == [1.0]  # tokens 0, 1 both
    (of_block,) = le.hidden_states(lm, ["The river"], settings=settings(top=2, mlp_input="block")).prompts
    assert of_block.cosine["mlp"] == pytest.approx([10 / (5 * math.sqrt(5))])  # (3, 4, 0) and (2, 1, 0)


def test_tokens_are_those_after_the_final_norm() -> None:
    lm = a_model_of_known_states()
    states = torch.zeros(1, 32)
    states[0, :3] = torch.tensor([4.0, 3.0, 1.0])
    assert top_tokens(lm, states, 2).tolist() == [[0, 1]]
    with torch.no_grad():
        lm.model.transformer.ln_f.weight[0] = -1.0
    assert top_tokens(lm, states, 2).tolist() == [[1, 2]]
    assert top_tokens(lm, states, 2, published=True).tolist() == [[0, 1]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_blocks_output_gives_the_models_own_tokens(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = a_model(architecture)
    batch = pad(lm.encode(PROMPTS[1:2]), lm.pad_id)
    with torch.no_grad(), lm.capture([Place(LAYERS - 1, "block")], 1) as states:
        logits = lm.forward(batch)[0]
    expected = logits.topk(5).indices
    last = states[Place(LAYERS - 1, "block")][0]
    if architecture == "gemma2":  # soft-capped logits have ties
        assert torch.equal(logits.gather(1, top_tokens(lm, last, 5)), logits.topk(5).values)
    else:
        assert torch.equal(top_tokens(lm, last, 5), expected)
    whole = top_tokens(lm, last, 5)
    monkeypatch.setattr("lightedit.analysis.unembedding._NUMBERS", 1000)  # two states at a time
    assert torch.equal(top_tokens(lm, last, 5), whole)


def test_jaccard_is_the_share_of_common_tokens() -> None:
    one, other = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]]), torch.tensor([[3, 1, 2], [4, 5, 6], [9, 2, 7]])
    assert jaccard(one, other).tolist() == [1.0, 0.0, 0.2]


def test_published_jaccard_counts_strings_that_occur_twice_in_the_union() -> None:
    tokenizer = tiny_tokenizer("bytelevel")
    by_text: dict[str, list[int]] = {}
    for token in range(3, 300):
        by_text.setdefault(tokenizer.decode([token]), []).append(token)
    half, other, third = next(tokens for tokens in by_text.values() if len(tokens) > 2)[:3]  # parts of characters
    (alone,) = by_text["a"]
    one, two = torch.tensor([[half, other]]), torch.tensor([[third, alone]])
    assert published_jaccard(tokenizer, one, two).tolist() == [1 / 3]
    assert published_jaccard(tokenizer, one, one).tolist() == [1 / 3]


def test_a_fact_stands_for_its_prompt(lm: le.LanguageModel, found: le.HiddenStates) -> None:
    fact = le.Fact("The capital of the {} was in", "city", "Rome")
    (prompt,) = le.hidden_states(lm, [fact], settings=settings()).prompts
    assert prompt.prompt == PROMPTS[1]
    assert prompt.cosine["mlp"] == pytest.approx(found.prompts[1].cosine["mlp"], abs=1e-6)


def test_the_size_of_a_pass_changes_nothing(lm: le.LanguageModel, found: le.HiddenStates) -> None:
    alone = le.hidden_states(lm, PROMPTS, settings=settings(tokens_per_pass=1))
    for one, other in zip(alone.prompts, found.prompts, strict=True):
        for part in ("attention", "mlp"):
            assert one.cosine[part] == pytest.approx(other.cosine[part], abs=1e-6)
            assert one.jaccard[part] == other.jaccard[part]


def test_means_are_over_prompts_with_their_intervals(found: le.HiddenStates) -> None:
    for measure in ("cosine", "jaccard"):
        values = torch.tensor([getattr(prompt, measure)["mlp"][1] for prompt in found.prompts], dtype=torch.float64)
        mean = found.means(measure, "mlp")[1]
        assert mean.value == pytest.approx(float(values.mean()))
        assert mean.half_width == pytest.approx(1.96 * float(values.std()) / math.sqrt(len(values)))
        assert mean.facts == len(PROMPTS)


# Files, figure


def test_the_table_has_a_row_for_each_layer_and_part(found: le.HiddenStates, tmp_path: Path) -> None:
    found.save(tmp_path)
    with (tmp_path / "hidden_states.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["layer", "part", "cosine", "jaccard", "cosine_half_width", "jaccard_half_width", "facts"]
    assert list(rows[0]) == columns
    assert [(row["layer"], row["part"]) for row in rows] == [
        (str(layer), part) for part in ("attention", "mlp") for layer in range(LAYERS)
    ]
    assert float(rows[4]["jaccard"]) == pytest.approx(found.means("jaccard", "mlp")[1].value)
    assert rows[0]["facts"] == str(len(PROMPTS))


def test_one_prompt_has_no_interval(lm: le.LanguageModel, tmp_path: Path) -> None:
    one = le.hidden_states(lm, PROMPTS[:1], settings=settings())
    assert {row["cosine_half_width"] for row in one.rows()} == {None}
    assert all(file.stat().st_size > 1000 for file in save_hidden_states_figure(one, tmp_path))


def test_a_saved_study_is_read_back_unchanged(found: le.HiddenStates, tmp_path: Path) -> None:
    assert le.HiddenStates.load(found.save(tmp_path)) == found


def test_a_damaged_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"hidden_states\.json"):
        le.HiddenStates.load(tmp_path)
    (tmp_path / "hidden_states.json").write_text('{"format": 1}')
    with pytest.raises(ArgumentError, match="damaged"):
        le.HiddenStates.load(tmp_path)


def test_a_study_says_what_it_found(found: le.HiddenStates) -> None:
    assert "4 prompts in model, 3 sequential blocks" in str(found) and "MLP cosine" in str(found)


def test_the_figure_has_both_panels_as_svg_and_png(found: le.HiddenStates, tmp_path: Path) -> None:
    files = save_hidden_states_figure(found, tmp_path)
    assert [file.name for file in files] == ["hidden_states.svg", "hidden_states.png"]
    text = files[0].read_text()
    assert "Cosine of what enters and leaves" in text and "Jaccard similarity of their top 20 tokens" in text
    assert ">attention<" in text and ">MLP<" in text


# Interruptions


def test_a_killed_run_goes_on_and_gives_the_same_numbers(
    lm: le.LanguageModel, found: le.HiddenStates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right_add, right_compare, passes = KeptRecords.add, module._compare, []

    def stops_at_the_third(self, index, record):
        if len(self.records) == 2:
            raise KeyboardInterrupt
        right_add(self, index, record)

    def counts(lm, rows, *others):
        passes.append(len(rows))
        return right_compare(lm, rows, *others)

    chosen = settings(tokens_per_pass=20)
    whole = le.hidden_states(lm, PROMPTS, settings=chosen)
    monkeypatch.setattr(module, "_compare", counts)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(KeptRecords, "add", stops_at_the_third)
        le.hidden_states(lm, PROMPTS, settings=chosen, checkpoint=tmp_path / "run")
    before = len(passes)
    assert le.hidden_states(lm, PROMPTS, settings=chosen, checkpoint=tmp_path / "run") == whole
    resumed = passes[before:]
    assert 0 < sum(resumed) < len(PROMPTS)
    le.hidden_states(lm, PROMPTS, settings=chosen, checkpoint=tmp_path / "run")
    assert passes[before:] == resumed  # all is stored


def test_a_checkpoint_of_another_study_is_refused(lm: le.LanguageModel, tmp_path: Path) -> None:
    le.hidden_states(lm, PROMPTS[:1], settings=settings(), checkpoint=tmp_path)
    with pytest.raises(le.ResumeError, match="top"):
        le.hidden_states(lm, PROMPTS[:1], settings=settings(top=3), checkpoint=tmp_path)
    with pytest.raises(le.ResumeError, match="facts"):
        le.hidden_states(lm, PROMPTS[:2], settings=settings(), checkpoint=tmp_path)


# Wrong input


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one"),
        ("The river", "into a list"),
        (le.Fact("The {} is", "river", "the"), "into a list"),
        (["The river", ""], "prompt 1: .*no token"),
        (["The river", 3], "prompt 1: .*int"),
        (["The river", "the " * 300], "prompt 1: .*256 positions"),
        (["\ud800"], "prompt 0"),
    ],
)
def test_wrong_prompts_are_refused_before_work(lm: le.LanguageModel, prompts, message: str, monkeypatch) -> None:
    monkeypatch.setattr(module, "_compare", None)
    with pytest.raises(ArgumentError, match=message):
        le.hidden_states(lm, prompts, settings=settings())


@pytest.mark.parametrize("as_published", [False, True])
def test_more_tokens_than_the_vocabulary_has_are_refused(lm: le.LanguageModel, as_published: bool) -> None:
    with pytest.raises(ArgumentError, match="top: 385 tokens, but the vocabulary of model has 384"):
        le.hidden_states(lm, PROMPTS, settings=settings(top=385, published=as_published))
    le.hidden_states(lm, PROMPTS[:1], settings=settings(top=384, published=as_published))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"top": 0}, "top"),
        ({"tokens_per_pass": 0}, "tokens_per_pass"),
        ({"mlp_input": "norm"}, "norm"),
        ({"published": True, "mlp_input": "block"}, "published"),
        ({"published": True, "after_norm": False}, "published"),
    ],
)
def test_settings_out_of_range_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        le.HiddenStateSettings(**changed)


@pytest.mark.parametrize(
    ("architecture", "chosen", "message"),
    [
        ("bamba", {}, "blocks without attention_out"),
        ("doge", {}, "neither the block's input nor what the MLP's output is added to"),
        ("minicpm3", {"published": True}, "leave published out"),
    ],
)
def test_a_model_of_which_it_is_not_known_what_enters_is_refused(
    architecture: str, chosen: dict[str, object], message: str
) -> None:
    lm = le.LanguageModel(tiny_model(architecture, layers=2), tiny_tokenizer("bytelevel"))
    with pytest.raises(le.UnsupportedModelError, match=message):
        le.hidden_states(lm, PROMPTS, settings=settings(**chosen))


def test_states_that_are_not_finite_are_refused() -> None:
    lm = a_model()
    lm.weight(Place(1)).fill_(math.nan)
    with pytest.raises((NumericalError, le.UnsupportedModelError)):
        le.hidden_states(lm, PROMPTS, settings=settings())


def test_swapped_arguments_are_named(lm: le.LanguageModel) -> None:
    with pytest.raises(TypeError, match="language model comes first"):
        le.hidden_states(PROMPTS, lm)  # type: ignore[arg-type]
