"""Reference texts, which the reference score RS compares with generated texts."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lightedit.data.facts import Fact, FactError
from lightedit.errors import ArgumentError
from lightedit.evaluation import generation
from lightedit.lm import LanguageModel
from lightedit.lm.arguments import check_model
from lightedit.metrics import RecordScores
from lightedit.metrics.functional import inverse_document_frequencies, reference_score
from lightedit.progress import progress


@dataclass(frozen=True)
class References:
    """Texts about entities that have the facts' new targets.

    Attributes:
        texts: fact -> all its texts, joined by spaces; facts without texts are left out.
        frequencies: term -> inverse document frequency (see `metrics.functional.reference_score`).
        own: whether the unedited model generated the texts; the score is then named RS_own instead of RS.
    """

    texts: Mapping[Fact, str]
    frequencies: Mapping[str, float]
    own: bool = False


def read_references(path: str | os.PathLike[str], facts: Sequence[Fact]) -> References:
    """Read the Wikipedia passages that were published with CounterFact (Meng et al., 2022, arXiv 2202.05262).

    Inverse document frequencies are read from `idf.npy` and `tfidf_vocab.json` in the file's folder, if both exist.
    Otherwise they are computed with every passage of the file as a document, as the published ones were.

    Args:
        path: `attribute_snippets.json`, a list of {"relation_id", "target_id", "samples": [{"text"}]}.
        facts: the facts, whose passages are found by `relation` and `target_id`.

    Raises:
        FileNotFoundError: the file does not exist.
        ArgumentError: a file has other contents, or only one of `idf.npy` and `tfidf_vocab.json` exists.
        FactError: no fact has passages.
    """
    path = Path(path)
    published = _published_frequencies(path.parent)
    passages: dict[tuple[Any, Any], list[str]] = {}
    documents: list[str] = []
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            found = [str(sample["text"]) for sample in entry["samples"]]
            passages.setdefault((entry["relation_id"], entry["target_id"]), []).extend(found)
            documents += found
    except (ValueError, KeyError, TypeError) as error:
        raise ArgumentError(
            f"{path} does not hold reference texts ({error!r}); expected a list of objects with relation_id, target_id "
            'and samples, each sample with a "text", as in attribute_snippets.json'
        ) from error
    key_of = {fact: (fact.relation, fact.target_id) for fact in facts}
    texts = {fact: " ".join(passages[key]) for fact, key in key_of.items() if passages.get(key)}
    if not texts:
        raise FactError(
            f"{path} has texts for none of the {len(facts)} facts: no entry has the relation and target_id of one; "
            "give nested CounterFact records, which have both, or let the unedited model write the texts"
        )
    return References(texts, inverse_document_frequencies(documents) if published is None else published)


def _published_frequencies(folder: Path) -> dict[str, float] | None:
    numbers, vocabulary = folder / "idf.npy", folder / "tfidf_vocab.json"
    if not numbers.exists() and not vocabulary.exists():
        return None
    for path in (numbers, vocabulary):
        if not path.exists():
            raise ArgumentError(
                f"{path} is missing beside the other of idf.npy and tfidf_vocab.json; keep both or neither"
            )
    try:
        values = np.load(numbers, allow_pickle=False)
        return {str(term): float(values[place]) for term, place in json.loads(vocabulary.read_text("utf-8")).items()}
    except (ValueError, AttributeError, IndexError, TypeError) as error:
        raise ArgumentError(
            f"{numbers} and {vocabulary} do not hold one number a term ({error!r}); remove both"
        ) from error


def write_references(lm: LanguageModel, facts: Sequence[Fact], progress_bar: bool = True) -> References:
    """Generate a text after each of the facts' attribute prompts with the unedited model.

    The settings of `generate` are those of `evaluate`. Each text is one document of the inverse document frequencies.
    Edits that the model carries are taken out meanwhile.

    Raises:
        FactError: no fact has attribute prompts.
        UnsupportedModelError: the model is a classifier.
    """
    check_model(lm, ("causal", "encoder-decoder"), "writing reference texts")
    prompts = list(dict.fromkeys(prompt for fact in facts for prompt in fact.attribute_prompts))
    if not prompts:
        raise FactError(
            f"none of the {len(facts)} facts has attribute_prompts, after which reference texts are written"
        )
    with lm.weights.unedited(), progress(f"writing {len(prompts)} reference texts", progress_bar) as report:
        written = dict(zip(prompts, generation.generate(lm, prompts, report=report), strict=True))
    texts = {
        fact: " ".join(written[prompt] for prompt in fact.attribute_prompts) for fact in facts if fact.attribute_prompts
    }
    return References(texts, inverse_document_frequencies(list(written.values())), own=True)


def with_reference_scores(
    facts: Sequence[Fact], records: Sequence[RecordScores], references: References
) -> list[RecordScores]:
    """Add the reference score to each record that has both generated and reference texts."""
    return [_with_reference_score(fact, record, references) for fact, record in zip(facts, records, strict=True)]


def _with_reference_score(fact: Fact, record: RecordScores, references: References) -> RecordScores:
    if record.generations is None or fact not in references.texts:
        return record
    joined = " ".join(record.generations.texts)
    score = reference_score([joined], [references.texts[fact]], references.frequencies).item()
    return replace(
        record, generations=replace(record.generations, reference_score=score, own_references=references.own)
    )
