import copy
import math

import pytest
import torch
from torch import Tensor

from lit_methods.batches import InteractionBatch
from lit_methods.metrics import NDCGAtK, RecallAtK, top_unseen_items


def brute_force(ranked: Tensor, targets: list[list[int]], k: int) -> tuple[list[float], list[float]]:
    """Card formulas, user by user, for users with targets."""
    recalls, ndcgs = [], []
    for items, wanted in zip(ranked.tolist(), targets, strict=True):
        if not wanted:
            continue
        hits = [item in wanted for item in items[:k]]
        recalls.append(sum(hits) / min(k, len(wanted)))
        dcg = sum(hit / math.log2(rank + 2) for rank, hit in enumerate(hits))
        ndcgs.append(dcg / sum(1 / math.log2(rank + 2) for rank in range(min(k, len(wanted)))))
    return recalls, ndcgs


def sparse(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    counts = torch.tensor([0, *map(len, rows)])
    return torch.tensor([i for row in rows for i in row], dtype=torch.int64), counts.cumsum(0)


@pytest.mark.parametrize("k", [1, 3, 10, 40])
def test_agree_with_a_loop(k) -> None:
    generator = torch.Generator().manual_seed(k)
    ranked = torch.stack([torch.randperm(40, generator=generator) for _ in range(50)])
    targets = [torch.randperm(40, generator=generator)[: i % 12].tolist() for i in range(50)]
    recall, ndcg = RecallAtK(k), NDCGAtK(k)
    for part in (slice(0, 17), slice(17, 50)):
        for metric in (recall, ndcg):
            metric.update(ranked[part], *sparse(targets[part]))
    for metric, expected in zip((recall, ndcg), brute_force(ranked, targets, k), strict=True):
        values = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(metric.compute(), values.mean(), rtol=1e-12, atol=0)
        torch.testing.assert_close(metric.standard_error(), values.std(correction=0) / len(values) ** 0.5)
        assert metric.count == len(values)
        assert metric.skipped == 50 - len(values)


def test_a_perfect_ranking_scores_one_however_many_targets() -> None:
    ranked, targets = torch.arange(100)[None], sparse([[2, 0, 1]])
    for metric in (RecallAtK(20), NDCGAtK(20), RecallAtK(2), NDCGAtK(2)):
        metric.update(ranked, *targets)
        assert metric.compute() == 1


def test_fewer_items_than_k() -> None:
    metric = NDCGAtK(100)
    metric.update(torch.tensor([[1, 0]]), *sparse([[1, 0]]))
    assert metric.compute() == 1


def test_no_target_at_all_counts_nobody() -> None:
    metric = RecallAtK(5)
    metric.update(torch.tensor([[1, 0], [0, 1]]), *sparse([[], []]))
    assert metric.count == 0
    assert metric.skipped == 2
    assert metric.compute().isnan()


def test_missing_recommendations_hit_nothing() -> None:
    metric = RecallAtK(2)
    metric.update(torch.tensor([[0, 1], [-1, -1]]), *sparse([[3], [0]]))  # -1 of user 1 is not item 3 of user 0
    assert metric.compute() == 0


def test_states_stay_float64_in_a_module_of_another_precision() -> None:
    module = torch.nn.Module()
    module.metric = RecallAtK(2)
    module.to(torch.bfloat16)
    module.metric.update(torch.tensor([[0, 1]]), *sparse([[0, 1, 2]]))
    assert module.metric.total.dtype == torch.float64
    assert copy.deepcopy(module).metric.compute() == 1


@pytest.mark.parametrize("k", [0, -1, 2.0])
@pytest.mark.parametrize("metric", [RecallAtK, NDCGAtK])
def test_bad_k(metric, k) -> None:
    with pytest.raises(ValueError, match="k must be an integer >= 1"):
        metric(k)


def test_top_unseen_items_leaves_out_the_history() -> None:
    items, offsets = sparse([[0, 2], [0, 1, 2]])
    history = InteractionBatch(items, offsets, None, items[:0], torch.zeros(3, dtype=torch.int64))
    scores = torch.tensor([[9.0, 1.0, 8.0, 2.0], [9.0, 1.0, 8.0, 2.0]])
    best, values = top_unseen_items(scores, history, 2)
    assert best.tolist() == [[3, 1], [3, -1]]
    assert values.tolist() == [[2.0, 1.0], [2.0, float("-inf")]]


def test_ties_do_not_crash() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    history = InteractionBatch(nothing, torch.zeros(2, dtype=torch.int64), None, nothing, torch.zeros(2).long())
    best, _ = top_unseen_items(torch.zeros(1, 6), history, 6)
    assert sorted(best[0].tolist()) == list(range(6))
