"""The claims of recipes/optimistic_omd, on the experiments of its benchmark; by hand with ``-m slow``."""

import pytest

from tests.benchmarks import bench_optimistic_omd as bench

pytestmark = pytest.mark.slow


def test_regret_is_affine_in_the_noise_and_below_its_bound() -> None:
    rows = {row["noise"]: row for row in bench.noise_scaling(seeds=(0,))}
    assert {n: rows[n]["mean"] for n in rows} == pytest.approx({0.0: 1.0, 0.1: 5.5, 0.3: 16, 1.0: 48}, rel=0.06)
    assert all(row["mean"] < row["bound (recalled)"] for row in rows.values())


def test_optimism_wins_under_drift() -> None:
    rows = bench.drift(seeds=(0,))
    quiet, noisy = ({row["learner"]: row["mean"] for row in rows if row["noise"] == noise} for noise in (0.0, 1.0))
    assert quiet["OptimisticOMD"] == pytest.approx(-3993, rel=0.01)
    for name, regret in quiet.items():
        assert name == "OptimisticOMD" or quiet["OptimisticOMD"] < regret
    assert quiet["OptimisticOMD"] < 1.25 * max(quiet["OGD, D / (G sqrt t)"], quiet["OMD, the same step"])
    assert noisy["OptimisticOMD"] < 1.25 * noisy["OGD, D / (G sqrt t)"]
    assert noisy["OptimisticOMD"] < noisy["OMD, the same step"]


def test_strongly_convex_regret_grows_logarithmically() -> None:
    exponents = {row["regime"]: row["exponent"] for row in bench.growth(seeds=(0,))}
    assert abs(exponents["no noise"]) < 0.01
    assert exponents["strongly convex, noise 0.5"] < 0.15
    assert exponents["exp-concave, noise 0.5"] < 0.5
    assert 0.4 < exponents["i.i.d. noise 0.3"] < 0.6


def test_ensemble_is_near_the_best_step_without_knowing_it() -> None:
    rows = bench.dynamic(seeds=(0,))
    for noise in (0.05, 0.3):
        regret = {row["learner"]: row["mean"] for row in rows if row["noise"] == noise}
        best = min(value for name, value in regret.items() if "step" in name)
        assert regret["OptimisticEnsemble"] < {0.05: 2.5, 0.3: 1.5}[noise] * best
        assert regret["OptimisticEnsemble"] < 0.5 * regret["OGD, D / (G sqrt T)"]


def test_games_end_where_the_card_says() -> None:
    gaps = {(row["game"], row["learner"]): row["gap"] for row in bench.games()}
    assert gaps["x y, 1000 rounds", "OptimisticOMD"] == pytest.approx(0.00896, abs=5e-6)
    assert gaps["x y, 1000 rounds", "ExtraGradient"] == pytest.approx(0.00977, abs=5e-6)
    assert gaps["x y, 1000 rounds", "descent-ascent (SGD)"] == pytest.approx(204.7, abs=0.05)
    assert gaps["rock-paper-scissors, 20000", "OptimisticOMD, entropy"] < 1e-14
    assert gaps["rock-paper-scissors, 20000", "without optimism"] == pytest.approx(1.53, abs=0.01)
