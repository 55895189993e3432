"""The claims of recipes/nash_mp on the word game, over two seeds; by hand with ``-m slow``."""

import statistics
from pathlib import Path

import pytest
import torch

from lit_methods.datamodules import WordGameDataModule
from tests.benchmarks.bench_nash_mp import run_ours, supervised_start

SEEDS = (0, 1)


@pytest.mark.slow
def test_nash_prox_is_more_robust_than_self_play_and_nash_md(tmp_path: Path) -> None:
    names = ("Nash Prox (group)", "self-play (eta=inf)", "Nash-MD-PG (mixture 0.125)")
    win: dict[str, list[float]] = {name: [] for name in names}
    worst: dict[str, list[float]] = {name: [] for name in names}
    for seed in SEEDS:
        folder = str(tmp_path / str(seed))
        supervised_start(folder, seed)
        for name in names:
            torch.manual_seed(seed)
            data = WordGameDataModule(seed=seed)
            data.setup("fit")
            evaluation, _, _ = run_ours(name, folder, data, steps=200, every=20)
            half = evaluation.points[5:]
            win[name].append(statistics.mean(point["reference"] for point in half))
            worst[name].append(statistics.mean(point["worst"] for point in half))
            if name == names[0]:
                assert half[-1]["junk"] < 0.05
    assert min(win[names[0]]) > 0.58
    for other in names[1:]:
        assert statistics.mean(worst[names[0]]) > statistics.mean(worst[other]), other
