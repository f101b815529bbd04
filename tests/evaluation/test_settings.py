"""Settings of an evaluation, and arguments in the wrong place, are refused before work starts."""

from typing import Any

import pytest

from lightedit.evaluation.evaluate import evaluate
from lightedit.evaluation.settings import EvaluationSettings
from lightedit.lm import LanguageModel
from lightedit.statistics.estimation import estimate_covariance
from tests.evaluation.facts import FRANCE, ITALY
from tests.models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel(tiny_model("gpt2"), tiny_tokenizer("bytelevel"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"harness_limit": 0}, "harness_limit: got 0"),
        ({"harness": "piqa"}, "give \\['piqa'\\]"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**fields)


def test_what_is_missing_is_found_before_a_model_is_loaded() -> None:
    EvaluationSettings(text=[[1, 2]]).check()
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        EvaluationSettings(text="missing.txt").check()
    with pytest.raises((FileNotFoundError, ImportError), match=r"nowhere|harness"):
        EvaluationSettings(harness=["nowhere.yaml"]).check()


def test_swapped_arguments_are_named(lm: LanguageModel) -> None:
    with pytest.raises(TypeError, match="got a list of 2; the language model comes first"):
        evaluate([FRANCE, ITALY], lm)
    with pytest.raises(TypeError, match="lm: expected a LanguageModel"):
        estimate_covariance([4, 5], lm)
    with pytest.raises(TypeError, match="places: expected a method, or a list"):
        estimate_covariance(lm, 5)
