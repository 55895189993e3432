"""The claims of recipes/nash_mp on the word game, over two seeds; by hand with ``-m slow``."""

import statistics
from pathlib import Path

import pytest

from tests.benchmarks.bench_nash_mp import BASELINE, one, start_model

SEEDS = (0, 1)


@pytest.mark.slow
def test_nash_prox_is_more_robust_than_self_play_and_nash_md(tmp_path: Path) -> None:
    others = ("self-play (eta=inf)", "Nash-MD-PG (mixture 0.125)")
    worst: dict[str, list[float]] = {name: [] for name in (BASELINE, *others)}
    for seed in SEEDS:
        folder = str(tmp_path / str(seed))
        start_model("tiny", folder, seed)
        for name in worst:
            seen = one(name, "tiny", folder, seed, steps=200)
            worst[name].append(seen["worst"])
            if name == BASELINE:
                assert seen["win"] > 0.58
                assert seen["junk"] < 0.05
    for other in others:
        assert statistics.mean(worst[BASELINE]) > statistics.mean(worst[other]), other
