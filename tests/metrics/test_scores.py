import random
import statistics
from datetime import timedelta

import pytest
import torch
from torch import distributed, multiprocessing

from lightedit.metrics import (
    EfficacyScore,
    GenerationEntropy,
    Generations,
    ParaphraseScore,
    PromptScores,
    RecordScores,
    edit_metrics,
    reported,
)
from lightedit.metrics.functional import edit_score_interval, generation_entropy

NAMES = {"ES", "PS", "NS", "EM", "PM", "NM", "S", "GE", "RS", "RS_own", "generation_success", "ERR", "TRR"} | {
    *(f"{kind}_accuracy" for kind in ("efficacy", "paraphrase", "neighborhood", "portability")),
    *("success_rate", "retain_accuracy", "equivalence_accuracy"),
}


def prompt_scores(n, generator, compared=False):
    nll, other = torch.rand(2, n, generator=generator, dtype=torch.float64) * 4
    shares = torch.randint(3, (n,), generator=generator) / 2
    return PromptScores(
        nll, other, shares, unchanged=torch.randint(2, (n,), generator=generator).double() if compared else None
    )


def generations(draw, index):
    texts = tuple(" ".join(draw.choices("abcde", k=draw.randint(5, 30))) for _ in range(draw.randint(1, 4)))
    score = draw.random() if index % 3 else None
    return Generations(texts, draw.choice([" Rome", " Paris"]), "Rome", score, own_references=index % 2 == 0)


def make_records(n, seed=0):
    """Random records, every fifth one held out; the others with 0 to 2 paraphrases, 0 to 9 neighbours, of which some
    are compared with an earlier prediction, 0 or 1 questions of portability and, mostly, 1 to 4 texts."""
    generator = torch.Generator().manual_seed(seed)
    draw = random.Random(seed)
    records = []
    for index in range(n):
        if index % 5 == 4:
            records.append(RecordScores(held_out=prompt_scores(1, generator)))
            continue
        paraphrases, neighbors = index % 3, index % 10
        records.append(
            RecordScores(
                prompt_scores(1, generator),
                prompt_scores(paraphrases, generator) if paraphrases else None,
                prompt_scores(neighbors, generator, compared=index % 2 == 0) if neighbors else None,
                generations(draw, index) if index % 4 else None,
                prompt_scores(1, generator) if index % 2 else None,
            )
        )
    return records


def summary(metrics):
    """Every metric's value and interval, as plain numbers."""
    return {name: [metric.compute().item(), *metric.interval().tolist()] for name, metric in metrics.items()}


def one_process(records):
    metrics = edit_metrics()
    metrics.update(records)
    return summary(metrics)


def test_the_order_of_records_does_not_matter_to_the_last_bit():
    records = make_records(97)
    expected = one_process(records)
    for seed in range(3):
        assert one_process(random.Random(seed).sample(records, len(records))) == expected


def test_each_metric_reads_its_own_prompts():
    records = make_records(23)
    values = {name: entry[0] for name, entry in one_process(records).items()}
    assert set(values) == NAMES

    def mean(kind, value):
        present = [scores for record in records if (scores := getattr(record, kind)) is not None]
        return 100 * statistics.fmean(
            statistics.fmean(value(scores, i) for i in range(len(scores.nll))) for scores in present
        )

    for name, kind in {"E": "efficacy", "P": "paraphrase", "N": "neighborhood"}.items():
        wins = mean(kind, lambda scores, i: float(scores.nll[i] < scores.nll_other[i]))
        margin = mean(kind, lambda scores, i: ((-scores.nll[i]).exp() - (-scores.nll_other[i]).exp()).item())
        assert values[f"{name}S"] == pytest.approx(wins)
        assert values[f"{name}M"] == pytest.approx(margin)
        assert values[f"{kind}_accuracy"] == pytest.approx(mean(kind, lambda scores, i: scores.accuracy[i].item()))
    assert values["S"] == pytest.approx(statistics.harmonic_mean([values["ES"], values["PS"], values["NS"]]))
    for name, kind in {"success_rate": "efficacy", "equivalence_accuracy": "paraphrase"}.items():
        assert values[name] == pytest.approx(mean(kind, lambda scores, i: float(scores.accuracy[i] == 1)))
    for name, kind in {"portability_accuracy": "portability", "ERR": "efficacy", "TRR": "held_out"}.items():
        assert values[name] == pytest.approx(mean(kind, lambda scores, i: scores.accuracy[i].item()))
    kept = [r.neighborhood.unchanged for r in records if r.neighborhood and r.neighborhood.unchanged is not None]
    assert 1 < len(kept) < sum(record.neighborhood is not None for record in records)
    assert values["retain_accuracy"] == pytest.approx(100 * statistics.fmean(x.mean().item() for x in kept))
    written = [record.generations for record in records if record.generations is not None]
    for name, own in {"RS": False, "RS_own": True}.items():
        likeness = [w.reference_score for w in written if w.reference_score is not None and w.own_references == own]
        assert len(likeness) > 1
        assert values[name] == pytest.approx(100 * statistics.fmean(likeness))
    entropies = [generation_entropy(one.texts).mean().item() for one in written]
    assert values["GE"] == pytest.approx(100 * statistics.fmean(entropies))
    assert values["generation_success"] == pytest.approx(
        100 * statistics.fmean(one.continuation == " Rome" for one in written)
    )


def test_one_update_a_record_equals_one_update_for_all():
    records = make_records(12)
    metrics = edit_metrics()
    for record in records:
        metrics.update([record])
    for name, expected in one_process(records).items():
        assert summary(metrics)[name] == pytest.approx(expected), name


def test_metrics_that_agree_on_the_first_record_stay_apart():
    won = PromptScores(torch.tensor([0.1]), torch.tensor([1.0]), torch.tensor([1.0]))
    lost = PromptScores(torch.tensor([1.0]), torch.tensor([0.1]), torch.tensor([0.0]))
    metrics = edit_metrics()
    metrics.update([RecordScores(won, won, won)])
    metrics.update([RecordScores(won, lost, won)])
    assert metrics.compute()["ES"] == 100
    assert metrics.compute()["PS"] == 50


def test_records_without_a_kind_do_not_count():
    metric = ParaphraseScore()
    won = PromptScores(torch.tensor([0.1]), torch.tensor([1.0]), torch.tensor([1.0]))
    metric.update([RecordScores(won, paraphrase=won), RecordScores(won)])
    assert metric.compute() == 100
    alone = PromptScores(torch.tensor([0.1]), None, torch.tensor([1.0]))
    metric.update([RecordScores(won, paraphrase=alone)])
    assert metric.compute() == 100


def test_no_record_gives_nan_and_reset_forgets():
    metrics = edit_metrics()
    metrics.update(make_records(9))
    metrics.reset()
    metrics.update([])
    assert all(value.isnan() for value in metrics.compute().values()) and not reported(metrics.compute())
    assert all(metric.interval().isnan().all() for metric in metrics.values())


def test_only_what_is_defined_and_new_is_reported():
    metrics = edit_metrics()
    won = PromptScores(torch.tensor([0.1]), torch.tensor([1.0]), torch.tensor([1.0]))
    plain = ["ES", "PS", "NS", "EM", "PM", "NM", "efficacy_accuracy", "paraphrase_accuracy", "neighborhood_accuracy"]
    metrics.update([RecordScores(won, won, won)])
    assert list(reported(metrics.compute())) == [*plain, "S"]
    compared = PromptScores(won.nll, won.nll_other, won.accuracy, unchanged=torch.zeros(1))
    metrics.update([RecordScores(won, won, compared)])
    knowledge_editor = ["success_rate", "retain_accuracy", "equivalence_accuracy"]
    assert list(reported(metrics.compute())) == [*plain, "S", *knowledge_editor]
    metrics.update([RecordScores(held_out=won)])
    found = reported(metrics.compute())
    assert list(found) == [*plain, "S", *knowledge_editor, "ERR", "TRR"]
    assert found["retain_accuracy"] == 0 and found["TRR"] == 100


def test_a_held_out_record_leaves_the_other_metrics_alone():
    records = make_records(31)
    edited = [record for record in records if record.held_out is None]
    assert len(edited) < len(records)
    for name, found in one_process(records).items():
        if name != "TRR":
            assert found == pytest.approx(one_process(edited)[name]), name


def test_interval_is_that_of_the_records():
    records = make_records(31)
    values = [100 * float(r.efficacy.nll[0] < r.efficacy.nll_other[0]) for r in records if r.efficacy]
    metric = EfficacyScore()
    metric.update(records)
    half = 1.96 * statistics.stdev(values) / len(values) ** 0.5
    assert metric.interval().tolist() == pytest.approx(
        [statistics.fmean(values) - half, statistics.fmean(values) + half]
    )
    assert metric.compute().item() == pytest.approx(statistics.fmean(values))


def test_edit_score_interval_is_that_of_the_records():
    records = make_records(31)

    def share(scores):
        return float("nan") if scores is None else (scores.nll < scores.nll_other).double().mean().item()

    edited = [record for record in records if record.held_out is None]
    rows = [[share(r.efficacy), share(r.paraphrase), share(r.neighborhood)] for r in edited]
    expected = 100 * edit_score_interval(torch.tensor(rows, dtype=torch.float64))
    assert one_process(records)["S"][1:] == pytest.approx(expected.tolist())


def _evaluate_in_one_of_two_processes(rank, path, results):
    distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    records = make_records(23)
    metrics = edit_metrics()
    if rank == 0:  # the other process has no record at first
        metrics.update(records)
    results["lone", rank] = summary(metrics)
    # had gathering changed a process's own state, records would now count twice
    metrics.update(records[:17] if rank == 0 else records[17:])
    results["shared", rank] = summary(metrics)
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_give_what_one_gives(tmp_path):
    records = make_records(23)
    expected = {"lone": one_process(records), "shared": one_process(records * 2)}
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_evaluate_in_one_of_two_processes, (tmp_path / "store", results), nprocs=2)
        for (stage, rank), found in results.items():
            for name in NAMES:
                assert found[name] == pytest.approx(expected[stage][name], rel=1e-12, abs=1e-12), (stage, rank, name)
        assert len(results) == 4


def test_generation_entropy_counts_every_text_of_a_record_and_every_record_alike():
    score = prompt_scores(1, torch.Generator().manual_seed(0))
    varied, dull = "to be or not to be", "no no no no no no"
    metric = GenerationEntropy()
    metric.update([RecordScores(score, generations=Generations((varied, dull, dull), "", "Rome"))])
    third = 100 * generation_entropy([varied]).item() / 3
    assert metric.compute().item() == pytest.approx(third)
    assert metric.interval().isnan().all()
    metric.update([RecordScores(score, generations=Generations((varied,), "", "Rome")), RecordScores(score)])
    assert metric.compute().item() == pytest.approx(2 * third)
    half = 1.96 * statistics.stdev([third, 3 * third]) / 2**0.5
    assert metric.interval().tolist() == pytest.approx([2 * third - half, 2 * third + half])
