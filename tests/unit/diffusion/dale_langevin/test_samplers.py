"""The samplers with exact scores: closed forms of the card, no training."""

import math
import warnings
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lit_methods.diffusion import DLS, UMS, Annealing, GeometricBrownian, Solver, VPLinear, sample
from lit_methods.diffusion.solvers import nodes
from tests.unit.diffusion.dale_langevin.exact import mixture_denoiser, normal_denoiser

PAPER = GeometricBrownian()
CHANNELS = GeometricBrownian(mu=0.1, volatility=[0.5, 1.0])


def path(process: GeometricBrownian, steps: int) -> list:
    return nodes(process, process.t_max * torch.arange(steps, -1, -1, dtype=torch.float64) / steps)


def draw(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("solver", [DLS(), UMS()])
def test_both_samplers_recover_a_mixture(solver: Solver) -> None:
    denoiser = mixture_denoiser(PAPER, [0.4, 0.6], [0.1, 0.6], 0.05)
    prior_mean, prior_std = 0.4, math.sqrt(0.05**2 + 0.24 * 0.25 + 0.64)
    start = prior_mean + prior_std * draw(20_000)
    y = sample(denoiser, x_init=start, solver=solver, steps=1000, generator=torch.Generator().manual_seed(1))
    x = PAPER.from_log(y, 0.0)
    assert (x > 0).all()
    upper = y > 0.35
    assert float(upper.double().mean()) == pytest.approx(0.6, abs=0.02)
    for part, mean in ((y[~upper], 0.1), (y[upper], 0.6)):
        assert float(part.mean()) == pytest.approx(mean, abs=0.01)
        assert 0.045 <= float(part.std()) <= 0.06


def one_step(solver: Solver, process: GeometricBrownian, y: Tensor, z: Tensor, delta: float) -> Tensor:
    """One noisy update, from the last time."""
    two = [process.t_max, process.t_max - delta, process.t_max - 2 * delta]
    denoiser = normal_denoiser(process, 0.2, 0.4)
    noises = iter([z, torch.zeros_like(z)])
    steps = []

    def predict(y: Tensor, t: float) -> Tensor:
        steps.append(y)
        return denoiser.x0(y, t)

    solver.solve(predict, y, nodes(process, torch.tensor(two, dtype=torch.float64)), process, lambda x: next(noises))
    return steps[1]


@pytest.mark.parametrize("process", [PAPER, GeometricBrownian(mu=1.0, volatility=0.6), CHANNELS])
def test_dls_is_the_papers_update(process: GeometricBrownian) -> None:
    y, z = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    delta, t = 1e-2, process.t_max
    mu = torch.tensor(process.mu, dtype=torch.float64)
    sigma = torch.tensor(process.volatility, dtype=torch.float64)
    x = process.from_log(y, t)
    denoiser = normal_denoiser(process, 0.2, 0.4)
    h = process.hyvarinen(denoiser.eps(y, t), t)
    expected = x * (delta * sigma**2 * h - delta * (mu - 1.5 * sigma**2) + delta**0.5 * sigma * z).exp()
    moved = process.from_log(one_step(DLS(), process, y, z, delta), t - delta)
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("process", [PAPER, GeometricBrownian(mu=1.0, volatility=0.6), CHANNELS])
def test_ums_is_the_papers_update(process: GeometricBrownian) -> None:
    y, z = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    delta, t = 1e-2, process.t_max
    mu = torch.tensor(process.mu, dtype=torch.float64)
    sigma = torch.tensor(process.volatility, dtype=torch.float64)
    x = process.from_log(y, t)
    denoiser = normal_denoiser(process, 0.2, 0.4)
    h = process.hyvarinen(denoiser.eps(y, t), t)
    expected = x * (1 + (2 * sigma**2 - mu) * delta + delta * sigma**2 * h + delta**0.5 * sigma * z)
    moved = process.from_log(one_step(UMS(), process, y, z, delta), t - delta)
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=0)


def test_the_two_agree_weakly() -> None:
    y, z = torch.randn(1000, 1, dtype=torch.float64), torch.randn(1000, 1, dtype=torch.float64)
    for delta in (1e-3, 1e-4):
        difference = one_step(UMS(), PAPER, y, z, delta) - one_step(DLS(), PAPER, y, z, delta)
        leading = -0.5 * 0.64 * delta * (z**2 - 1)
        assert float((difference - leading).abs().max()) < 60 * delta**1.5


@pytest.mark.parametrize("solver", [DLS(), UMS(), "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [20, 250])
def test_a_point_mass_is_recovered(solver: Solver | str, steps: int) -> None:
    denoiser = normal_denoiser(PAPER, 0.3, 0.0)
    y = sample(denoiser, x_init=0.3 + 0.8 * draw(200), solver=solver, steps=steps)
    assert float((y - 0.3).abs().max()) < 1e-6


def test_log_normal_data_keeps_its_moments_also_with_drift_and_in_few_steps_of_the_ode() -> None:
    solver: Solver | str
    for process in (PAPER, GeometricBrownian(mu=-0.5, volatility=0.6)):
        denoiser = normal_denoiser(process, 0.2, 0.3)
        spread = math.sqrt(0.09 + float(process.sigma(1.0)) ** 2)
        z = draw(20_000)
        for solver, steps, grid in ((DLS(), 500, "uniform"), (UMS(), 500, "uniform"), ("dpmpp_2m", 20, "karras")):
            y = sample(denoiser, x_init=0.2 + spread * z, solver=solver, steps=steps, grid=grid)
            x = process.from_log(y, 0.0)
            assert float(x.log().mean()) == pytest.approx(0.2, abs=0.01)
            assert float(x.log().std()) == pytest.approx(0.3, abs=0.01)


def test_the_ode_in_20_steps_steps_in_the_noise_level() -> None:
    denoiser = normal_denoiser(PAPER, 0.2, 0.3)
    y = 0.2 + draw(50)
    expected = y
    for here, there in pairwise(path(PAPER, 20)):
        expected = expected + (there.point.sigma - here.point.sigma) * denoiser.eps(expected, here.t)
    torch.testing.assert_close(sample(denoiser, x_init=y, solver="ddim", steps=20), expected)


@pytest.mark.parametrize(("decay", "std"), [(1.0, 0.3005), (0.995, 0.111)])
def test_annealed_noise_narrows_the_distribution(decay: float, std: float) -> None:
    denoiser = normal_denoiser(PAPER, 0.0, 0.3)
    solver = DLS(Annealing(noise_decay=decay))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = sample(denoiser, x_init=math.sqrt(0.73) * draw(20_000), solver=solver, steps=1000)
    assert float(y.std()) == pytest.approx(std, rel=0.03)


def test_heuristics_say_so_and_the_sampler_of_the_model_does_not() -> None:
    denoiser, y = normal_denoiser(PAPER, 0.0, 0.3), draw(2)
    for annealing in (
        Annealing(noise_decay=0.99),
        Annealing(inner_steps=2),
        Annealing(delta=6e-2),
    ):
        with pytest.warns(UserWarning, match="is a heuristic that narrows the distribution"):
            sample(denoiser, x_init=y, solver=DLS(annealing), steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for solver in (DLS(), DLS(Annealing(delta=0.1)), DLS(Annealing(delta=0.05, inner_steps=2)), UMS()):
            sample(denoiser, x_init=y, solver=solver, steps=10)


def test_inner_and_polishing_updates_are_counted_and_the_last_ones_have_no_noise() -> None:
    denoiser, y = normal_denoiser(PAPER, 0.0, 0.3), draw(3)
    seen: list[float] = []
    noises = []

    def predict(y: Tensor, t: float) -> Tensor:
        seen.append(t)
        return denoiser.x0(y, t)

    def noise(y: Tensor) -> Tensor:
        noises.append(len(seen))
        return torch.zeros_like(y)

    with pytest.warns(UserWarning, match="heuristic"):
        DLS(Annealing(1e-2, 3, 0.9, 2)).solve(predict, y, path(PAPER, 4), PAPER, noise)
    assert seen == [1.0] * 3 + [0.75] * 3 + [0.5] * 3 + [0.25] * 5
    assert noises == [*range(1, 12)], "every update but the last of the last time, and those that polish"


def test_dls_is_positive_for_any_step_and_ums_says_when_it_is_not() -> None:
    denoiser = normal_denoiser(PAPER, 0.0, 0.3)
    y = 3 * draw(1000)
    assert PAPER.from_log(sample(denoiser, x_init=y, solver=DLS(), steps=2), 0.0).isfinite().all()
    loud = GeometricBrownian(mu=8.0, volatility=4.0)
    wild = normal_denoiser(loud, 0.0, 0.3)
    with pytest.warns(UserWarning, match=r"\d+ factors of UMS were not positive in 2 steps; each became floor=1e-06"):
        y = sample(wild, x_init=4 * draw(1000), solver=UMS(), steps=2)
    assert y.isfinite().all()
    with pytest.raises(RuntimeError, match="were not positive in 2 steps: take more steps, DLS, or a floor"):
        sample(wild, x_init=4 * draw(1000), solver=UMS(floor=None), steps=2)


def test_they_need_the_multiplicative_process() -> None:
    with pytest.raises(ValueError, match="process must be GeometricBrownian for DLS and UMS, got VPLinear"):
        DLS().solve(lambda y, t: y, draw(1), nodes(VPLinear(), torch.tensor([1.0, 0.5])), VPLinear(), draw)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delta": 0.0}, "delta must be > 0, got 0"),
        ({"inner_steps": 0}, "inner_steps must be >= 1, got 0"),
        ({"noise_decay": 1.5}, r"noise_decay must be in \(0, 1\], got 1.5"),
        ({"polish_steps": -1}, "polish_steps must be >= 0, got -1"),
    ],
)
def test_bad_annealing_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Annealing(**arguments)
    with pytest.raises(ValueError, match="floor must be in"):
        UMS(floor=0.0)
