"""Weights, bands and steps against closed forms, searches and simulations."""

import json
import math

import pytest
import torch
from torch import Tensor

from lit_methods.games import (
    GameBounds,
    SmallGainCertificate,
    optimal_weights,
    small_gain_margin,
    small_gain_matrix,
    timescale_band,
    weight_bands,
)
from lit_methods.games.small_gain.certificate import certified_rk4_step, euler_factor


def random_bounds(number: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mu = torch.rand(number, generator=draw).double() + 0.5
    coupling = torch.rand(number, number, generator=draw).double() / number
    return mu, coupling.fill_diagonal_(0.0)


@pytest.mark.parametrize(("there", "back"), [(10.0, 0.05), (0.3, 0.7), (1.0, 1.0)])
@pytest.mark.parametrize("mu", [(1.0, 1.0), (1.0, 4.0), (0.2, -0.1)])
def test_two_players_in_closed_form(mu: tuple[float, float], there: float, back: float) -> None:
    given = torch.tensor(mu, dtype=torch.float64), torch.tensor([[0.0, there], [back, 0.0]], dtype=torch.float64)
    weights, margin = optimal_weights(*given)
    first, second = given[0].tolist()
    assert weights.tolist() == pytest.approx([1.0, there / back])
    assert margin == pytest.approx(
        0.5 * (first + second - math.sqrt((first - second) ** 2 + 4 * there * back)), abs=1e-12
    )
    assert (timescale_band(*given) is not None) == (first > 0 and second > 0 and first * second > there * back)


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.29])
def test_the_band_ends_where_the_margin_is_reached(margin: float) -> None:
    mu, coupling = torch.ones(2).double(), torch.tensor([[0.0, 10.0], [0.05, 0.0]], dtype=torch.float64)
    band = timescale_band(mu, coupling, margin)
    assert band is not None
    for ratio in band:
        found = small_gain_margin(mu, coupling, torch.tensor([1.0, ratio], dtype=torch.float64))
        assert float(found) == pytest.approx(margin, abs=1e-9)
    assert math.sqrt(band[0] * band[1]) == pytest.approx(200.0)
    if margin == 0.0:
        assert band == pytest.approx((34.3145750508, 1165.6854249492))
    assert timescale_band(mu, coupling, 0.3) is None


def test_bands_without_a_coupling_are_limits() -> None:
    mu = torch.tensor([1.0, 2.0])
    assert timescale_band(mu, torch.zeros(2, 2)) == (0.0, math.inf)
    assert timescale_band(mu, torch.tensor([[0.0, 2.0], [0.0, 0.0]])) == pytest.approx((0.5, math.inf))
    assert timescale_band(mu, torch.tensor([[0.0, 0.0], [2.0, 0.0]])) == pytest.approx((0.0, 2.0))


@pytest.mark.parametrize("number", [3, 4, 5, 6])
def test_no_random_weights_are_better(number: int) -> None:
    mu, coupling = random_bounds(number, number)
    weights, margin = optimal_weights(mu, coupling)
    eigenvalues = torch.linalg.eigvals(torch.diag(mu) - coupling)
    assert margin == pytest.approx(float(eigenvalues.real.min()), abs=1e-12)
    logs = 2 * torch.randn(10_000, number, generator=torch.Generator().manual_seed(0)).double()
    tried = weights * logs.exp()
    root = tried.sqrt()
    scaled = root[:, :, None] * coupling / root[:, None, :]
    others = torch.linalg.eigvalsh(torch.diag(mu) - (scaled + scaled.mT) / 2)[:, 0]
    assert float(others.max()) <= margin + 1e-12


def test_margins_do_not_depend_on_scale_or_order() -> None:
    mu, coupling = random_bounds(4, 0)
    weights = torch.tensor([1.0, 3.0, 0.2, 7.0]).double()
    order = torch.tensor([2, 0, 3, 1])
    margin = small_gain_margin(mu, coupling, weights)
    torch.testing.assert_close(small_gain_margin(mu, coupling, 1e9 * weights), margin)
    torch.testing.assert_close(small_gain_margin(mu[order], coupling[order][:, order], weights[order]), margin)
    matrix = small_gain_matrix(mu, coupling, weights, float(margin))
    scaled = matrix / (weights[:, None] * weights).sqrt()
    assert float(torch.linalg.eigvalsh(scaled)[0]) == pytest.approx(0.0, abs=1e-12)
    assert optimal_weights(mu, torch.zeros(4, 4))[1] == float(mu.min())
    assert optimal_weights(mu, 1e6 * coupling)[1] < 0


def test_a_player_whom_nobody_reaches() -> None:
    mu, coupling = torch.tensor([1.0, 2.0]), torch.tensor([[0.0, 3.0], [0.0, 0.0]])
    weights, margin = optimal_weights(mu, coupling)
    assert bool((weights > 0).all())
    assert 1 - 1e-4 < margin <= 1.0  # the limit is min mu


def test_weights_for_longer_steps() -> None:
    mu, coupling = torch.tensor([1.0, 1.0]), torch.tensor([[0.0, 10.0], [0.05, 0.0]])
    matrix = torch.tensor([[1.0, 10.0], [0.05, 1.0]]).double()

    def lipschitz(weights: Tensor) -> float:
        root = weights.sqrt()
        return float(torch.linalg.matrix_norm(root[:, None] * matrix / root, 2))

    def step(weights: Tensor, power: int) -> float:
        return float(small_gain_margin(mu.double(), coupling.double(), weights)) / lipschitz(weights) ** power

    for objective, power in (("euler", 2), ("rk4", 1)):
        weights, _ = optimal_weights(mu, coupling, objective, lipschitz)
        grid = torch.logspace(1, 4, 400, dtype=torch.float64)
        best = max(step(torch.tensor([1.0, float(r)]).double(), power) for r in grid)
        assert step(weights, power) >= best - 1e-12
    with pytest.raises(ValueError, match="lipschitz must be given"):
        optimal_weights(mu, coupling, "rk4")


def test_bands_of_several_players() -> None:
    mu, coupling = random_bounds(3, 1)
    weights, margin = optimal_weights(mu, coupling)
    bands = weight_bands(mu, coupling, weights, 0.5 * margin)
    assert bands is not None
    for player, ends in enumerate(bands):
        for end in ends:
            moved = weights.clone()
            moved[player] = end
            assert float(small_gain_margin(mu, coupling, moved)) == pytest.approx(0.5 * margin, abs=1e-9)
    assert weight_bands(mu, coupling, weights, 2 * margin) is None


@pytest.mark.parametrize("ratio", [0.9, 0.1, 1e-3, 1e-6])
def test_the_certified_runge_kutta_step_is_the_root(ratio: float) -> None:
    step = certified_rk4_step(ratio, 1.0)

    def growth(h: float) -> float:
        return math.sqrt(1 - 2 * h * ratio + h * h) + h * h / 2 + h**3 / 6 + h**4 / 24

    assert growth(step) <= 1 + 1e-15
    assert growth(1.01 * step) > 1
    assert certified_rk4_step(-0.1, 1.0) == 0.0
    assert euler_factor(ratio, 1.0, ratio) == pytest.approx(math.sqrt(1 - ratio**2))


def test_json_round_trip() -> None:
    bounds = GameBounds(torch.tensor([1.0, 2.0]).double(), torch.tensor([[0.0, 1.0], [0.0, 0.0]]).double(), True)
    certificate = SmallGainCertificate.from_margins(
        bounds, torch.tensor([1.0, 2.0]).double(), 2.0, 0.1, True, euclidean_margin=0.1, true_margin=0.2
    )
    text = json.dumps(certificate.to_dict(), allow_nan=False)
    again = SmallGainCertificate.from_dict(json.loads(text))
    assert again.to_dict() == certificate.to_dict()
    assert again.timescale_band == pytest.approx((0.125, math.inf))
    assert torch.equal(again.weights, certificate.weights)


@pytest.mark.parametrize(
    ("mu", "coupling", "weights", "message"),
    [
        ([1.0], [[0.0]], [1.0], "mu must have one entry for each of 2 or more"),
        ([1.0, math.nan], [[0.0, 1.0], [1.0, 0.0]], [1.0, 1.0], "mu must be finite"),
        ([1.0, 1.0], [[0.0, 1.0]], [1.0, 1.0], "coupling must be a 2 x 2"),
        ([1.0, 1.0], [[0.0, -1.0], [1.0, 0.0]], [1.0, 1.0], "coupling must be >= 0"),
        ([1.0, 1.0], [[1.0, 1.0], [1.0, 0.0]], [1.0, 1.0], "zero diagonal"),
        ([1.0, 1.0], [[0.0, 1.0], [1.0, 0.0]], [1.0, 0.0], "weights must be > 0"),
        ([1.0, 1.0], [[0.0, 1.0], [1.0, 0.0]], [1.0, math.inf], "weights must be > 0"),
        ([1.0, 1.0], [[0.0, 1.0], [1.0, 0.0]], [1.0], "weights must have 2"),
    ],
)
def test_bad_bounds(mu: list[float], coupling: list[list[float]], weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_gain_matrix(torch.tensor(mu), torch.tensor(coupling), torch.tensor(weights))


def test_unknown_objectives_and_more_players_than_two() -> None:
    mu, coupling = random_bounds(3, 0)
    with pytest.raises(ValueError, match="objective must be one of"):
        optimal_weights(mu, coupling, "speed")
    with pytest.raises(ValueError, match="see weight_bands"):
        timescale_band(mu, coupling)
