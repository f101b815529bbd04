"""Reference texts, which the reference score RS compares with what a model writes."""

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
from lightedit.metrics import RecordScores
from lightedit.metrics.functional import inverse_document_frequencies, reference_score
from lightedit.progress import progress


@dataclass(frozen=True)
class References:
    """Texts about things of which facts' new targets are true.

    Attributes:
        texts: fact -> all its texts, joined by spaces; facts without any are left out.
        frequencies: term -> inverse document frequency (see `metrics.functional.reference_score`).
        own: whether the unedited model wrote the texts; scores against them go by the name RS_own, not RS.
    """

    texts: Mapping[Fact, str]
    frequencies: Mapping[str, float]
    own: bool = False


def read_references(path: str | os.PathLike[str], facts: Sequence[Fact]) -> References:
    """Read the passages of Wikipedia that were published with CounterFact (Meng et al., 2022, arXiv 2202.05262).

    Inverse document frequencies are those of `idf.npy` and `tfidf_vocab.json`, if both lie beside the file as
    published. Without them every passage of the file is counted as a document, which is how the two were made.

    Args:
        path: `attribute_snippets.json`, a list of {"relation_id", "target_id", "samples": [{"text"}]}.
        facts: those to find passages for, by their `relation` and `target_id`.

    Raises:
        FileNotFoundError: there is no such file.
        ArgumentError: a file holds something else, or only one of the two lies beside it.
        FactError: there are passages for none of the facts.
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
    """Let the unedited model write a text after each of the facts' attribute prompts.

    They are drawn as those of `evaluate` are; each is one document of the inverse document frequencies. Edits that
    the model carries are lifted meanwhile.

    Raises:
        FactError: no fact has attribute prompts.
    """
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
    """Compare what was generated for each fact with its reference texts, where both are there."""
    return [_with_reference_score(fact, record, references) for fact, record in zip(facts, records, strict=True)]


def _with_reference_score(fact: Fact, record: RecordScores, references: References) -> RecordScores:
    if record.generations is None or fact not in references.texts:
        return record
    joined = " ".join(record.generations.texts)
    score = reference_score([joined], [references.texts[fact]], references.frequencies).item()
    return replace(
        record, generations=replace(record.generations, reference_score=score, own_references=references.own)
    )
