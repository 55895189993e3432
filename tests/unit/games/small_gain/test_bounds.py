"""Certificates of games against closed forms, the paper's numbers and trajectories."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lit_methods.games import (
    DifferentiableGame,
    MarkovGame,
    MatrixGame,
    NetworkGame,
    PreferenceGame,
    QuadraticGame,
    RingGAN,
    certify,
    estimate_bounds,
    pseudo_gradient,
)
from lit_methods.games.small_gain.bounds import sample_points
from tests.distributed.launch import run_ranks

ZEROS = [torch.zeros(1).double()] * 2


class Game:
    """A game of two numbers."""

    def __init__(self, *losses) -> None:
        self._losses = losses

    def losses(self, *blocks: Tensor) -> Sequence[Tensor]:
        x, y = (block[0] for block in blocks)
        return [loss(x, y) for loss in self._losses]


def random_game(seed: int, sizes: tuple[int, ...] = (2, 3, 1)) -> QuadraticGame:
    draw = torch.Generator().manual_seed(seed)
    own, coupling = [], []
    for i, rows in enumerate(sizes):
        root = torch.randn(rows, rows, generator=draw).double()
        own.append(root @ root.T + 0.5 * torch.eye(rows).double())
        coupling.append(
            [None if i == j else 0.3 * torch.randn(rows, n, generator=draw).double() for j, n in enumerate(sizes)]
        )
    return QuadraticGame(own, coupling)


def zeros(game: QuadraticGame) -> list[Tensor]:
    return [torch.zeros(size).double() for size in game.sizes]


def test_the_papers_first_game() -> None:
    found = certify(QuadraticGame.toy(), ZEROS)
    assert found.certified
    assert found.exact
    assert found.weights.tolist() == pytest.approx([1.0, 200.0])
    assert found.margin == pytest.approx(1 - math.sqrt(0.5))
    assert found.lipschitz == pytest.approx(1 + math.sqrt(0.5))
    assert found.euclidean_margin == pytest.approx(-4.025)
    assert found.euler_step_max == pytest.approx(0.2010101268)
    assert found.rk4_step_cfl == pytest.approx(2.5 / (1 + math.sqrt(0.5)))
    assert found.trust_radius == pytest.approx(0.1)


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0, 1.4, 1.5])
def test_the_papers_quadratic_game(strength: float) -> None:
    found = certify(QuadraticGame.rotated(8, strength), [torch.zeros(8)] * 2)
    assert found.margin == pytest.approx(1 - strength * math.sqrt(0.5), abs=1e-10)
    assert found.true_margin == pytest.approx(found.margin, abs=1e-10)
    assert found.euclidean_margin == pytest.approx(1 - 5.025 * strength)
    assert found.certified == (strength < math.sqrt(2))


@pytest.mark.parametrize("seed", range(5))
def test_the_certified_margin_is_below_the_true_one(seed: int) -> None:
    game = random_game(seed)
    found = certify(game, zeros(game))
    assert found.margin <= found.true_margin + 1e-12
    if found.euclidean_margin <= 0:
        assert not certify(game, zeros(game), weights=torch.ones(3)).certified


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_certified_steps_contract(method: str, project: bool) -> None:
    game = random_game(3, (2, 2))
    found = certify(game, zeros(game))
    assert found.certified
    root = found.weights.sqrt().repeat_interleave(2)
    draw = torch.Generator().manual_seed(0)

    def field(x: Tensor) -> Tensor:
        return torch.cat(pseudo_gradient(game, list(x.split(2))))

    def move(x: Tensor) -> Tensor:
        if method == "euler":
            moved = x - 0.99 * found.euler_step_max * field(x)
        else:
            h = found.rk4_step_certified
            k1 = field(x)
            k2 = field(x - h / 2 * k1)
            k3 = field(x - h / 2 * k2)
            moved = x - h / 6 * (k1 + 2 * k2 + 2 * k3 + field(x - h * k3))
        return moved.clamp(-0.5, 0.5) if project else moved

    for _ in range(20):
        x, y = torch.rand(2, 4, generator=draw).double() - 0.5
        before, after = ((root * d).norm() for d in (x - y, move(x) - move(y)))
        assert float(after) < float(before)


def test_the_papers_markov_game() -> None:
    game = MarkovGame()
    center = [torch.zeros(4).double()] * 2
    assert [float(loss) for loss in game.losses(*center)] == pytest.approx([-2 * math.log(2)] * 2)
    here = estimate_bounds(game, [block[None] for block in center], metric=game.fisher_metric)
    assert here.mu.tolist() == pytest.approx([1.0, 1.0])
    assert here.coupling.tolist() == [pytest.approx([0.0, 0.55]), pytest.approx([0.55, 0.0])]
    found = certify(game, center, 0.1, metric=game.fisher_metric)
    assert found.certified
    assert found.frozen_metric
    assert not found.exact
    assert found.bounds.mu.tolist() == pytest.approx([0.9344] * 2, abs=1e-3)
    assert float(found.bounds.coupling[0, 1]) == pytest.approx(0.6009, abs=1e-3)
    assert found.lipschitz == pytest.approx(1.5718, abs=1e-3)
    assert found.euler_step_max == pytest.approx(0.2699, abs=1e-3)
    assert found.timescale_band == pytest.approx((0.1326, 7.5387), rel=1e-2)
    shifted = [block + torch.tensor([3.0, 3.0, -1.0, -1.0]).double() for block in center]
    again = certify(game, shifted, 0.1, metric=game.fisher_metric)
    assert again.margin == pytest.approx(found.margin, abs=1e-9)


def test_gaps_of_the_markov_game() -> None:
    game = MarkovGame()
    at_rest = game.gaps(torch.zeros(4), torch.zeros(4))
    moved = game.gaps(torch.tensor([1.0, 0.0, 0.0, 0.5]), torch.zeros(4))
    assert bool((at_rest < 1e-9).all())
    assert float(moved[0]) > 0.05
    with pytest.raises(ValueError, match="blocks must be one for each of 2 players, got 1"):
        game.gaps(torch.zeros(4))
    there = [torch.zeros(4)] * 2
    assert float(game.divergence(there, there).sum()) == 0.0
    assert bool((game.divergence(there, [torch.arange(4.0)] * 2) > 0).all())


def test_norms_are_singular_values_and_curvatures_are_of_the_symmetric_part() -> None:
    own = [torch.eye(2).tolist(), torch.eye(2).tolist()]
    game = QuadraticGame(own, [[None, [[0.0, 2.0], [0.0, 0.0]]], [[[0.0, 0.0], [0.0, 0.0]], None]])
    points = [torch.zeros(1, 2)] * 2
    for method in ("dense", "matrix_free"):
        assert float(estimate_bounds(game, points, method=method).coupling[0, 1]) == pytest.approx(2.0)


@pytest.mark.parametrize("sizes", [(1, 2), (3, 5, 2)])
@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_without_the_jacobian(sizes: tuple[int, ...], scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    game = random_game(0, sizes)
    scaled = Scaled(game, scale)
    points = [torch.zeros(1, size) for size in sizes]
    dense = estimate_bounds(scaled, points)
    for small in (512, 0):  # dense for small blocks; then Lanczos and power iterations
        monkeypatch.setattr("lit_methods.games.small_gain.bounds._DENSE_SIZE", small)
        torch.manual_seed(small)
        free = estimate_bounds(scaled, points, method="matrix_free")
        assert not free.exact
        torch.testing.assert_close(free.mu, dense.mu, rtol=1e-6, atol=0)
        torch.testing.assert_close(free.coupling, dense.coupling, rtol=1e-6, atol=0)
        assert bool((free.mu <= dense.mu + 1e-10 * scale).all())
        assert bool((free.coupling >= dense.coupling * (1 - 1e-10)).all())


class Scaled:
    def __init__(self, game: DifferentiableGame, factor: float) -> None:
        self.game, self.factor = game, factor

    def losses(self, *blocks: Tensor) -> Sequence[Tensor]:
        return [self.factor * loss for loss in self.game.losses(*blocks)]


def test_chunks_do_not_matter() -> None:
    game, points = MarkovGame(), sample_points([torch.zeros(4)] * 2, 0.1, "uniform", 20)
    whole = estimate_bounds(game, points, metric=game.fisher_metric)
    for size in (1, 7):
        part = estimate_bounds(game, points, metric=game.fisher_metric, chunk_size=size)
        torch.testing.assert_close(part.mu, whole.mu, rtol=0, atol=1e-12)
        torch.testing.assert_close(part.coupling, whole.coupling, rtol=0, atol=1e-12)


def test_losses_that_depend_on_values_need_one_point_at_a_time() -> None:
    game = Game(lambda x, y: x * x * (2.0 if x.item() > 0 else 1.0), lambda x, y: y * y)
    assert certify(game, [torch.ones(1)] * 2, chunk_size=1).margin == pytest.approx(2.0)


def test_losses_without_curvature_or_without_the_other_player() -> None:
    alone = certify(Game(lambda x, y: 0.5 * x * x, lambda x, y: 0.5 * y * y), ZEROS)
    assert alone.margin == pytest.approx(1.0)
    assert alone.timescale_band == (0.0, math.inf)
    assert alone.certified
    linear = certify(Game(lambda x, y: 3 * x, lambda x, y: 0.5 * y * y), ZEROS)
    assert float(linear.bounds.mu[0]) == 0.0
    assert not linear.certified


def test_kinks_are_found_by_pairs() -> None:
    game = Game(lambda x, y: 0.5 * x * x - x.abs() + 0.3 * x * y, lambda x, y: 0.5 * y * y - 0.2 * x * y)
    found = certify(game, ZEROS)
    assert found.margin > 0
    assert not found.certified
    assert "a pair of points contradicts the margin" in found.hint
    assert found.euler_step_max == 0.0


def test_what_has_no_certificate() -> None:
    payoffs = certify(Game(lambda x, y: -x * x + x * y, lambda x, y: -y * y), ZEROS)
    assert not payoffs.certified
    assert "negate payoffs" in payoffs.hint
    bilinear = MatrixGame([[1.0]])
    assert not certify(bilinear, bilinear.blocks()).certified
    sharp = Game(lambda x, y: x.abs().sqrt() + x * x, lambda x, y: y * y)
    with pytest.raises(ValueError, match=r"second derivatives of losses\[0\] are not finite at 1 of"):
        certify(sharp, ZEROS)
    with pytest.raises(ValueError, match="radius must be > 0"):
        certify(bilinear, bilinear.blocks(), 0.0)
    with pytest.raises(ValueError, match="sampling must be one of"):
        certify(bilinear, bilinear.blocks(), sampling="grid")
    with pytest.raises(ValueError, match="losses must be one for each of 2 players, got 1"):
        certify(Game(lambda x, y: x * y), ZEROS)
    with pytest.raises(ValueError, match="method must be"):
        estimate_bounds(bilinear, [torch.zeros(1, 1)] * 2, method="guess")


def test_unequal_losses_are_another_game() -> None:
    def scaled(factor: float) -> Game:
        return Game(lambda x, y: 0.5 * x * x + 10 * x * y, lambda x, y: factor * (0.5 * y * y + 0.05 * x * y))

    for factor, margin, weight in ((4.0, 0.4384471872, 50.0), (0.25, 0.1096117968, 800.0)):
        found = certify(scaled(factor), ZEROS)
        assert found.margin == pytest.approx(margin)
        assert found.weights.tolist() == pytest.approx([1.0, weight])


def test_games_of_the_library() -> None:
    preferences = PreferenceGame([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]], beta=2.0)
    assert certify(preferences, preferences.blocks()).certified
    weak = PreferenceGame([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]], beta=0.01)
    assert not certify(weak, weak.blocks()).certified
    gan = RingGAN(hidden_features=(3,), latent_dim=2, batch_size=8)
    before = [p.detach().clone() for p in gan.parameters()]
    assert not certify(gan, gan.blocks(), 0.01, sampling="sobol", num_points=2).certified
    assert all(torch.equal(p, q) for p, q in zip(gan.parameters(), before, strict=True))


def test_networks_as_players() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    x = torch.randn(5, 2).double()

    def losses() -> list[Tensor]:
        a, b = first(x), second(x)
        return [(a - 0.1 * b).square().mean(), (b + 0.1 * a).square().mean()]

    game = NetworkGame(losses, [first, second])
    found = certify(game, game.blocks(), 0.01, num_points=8)
    assert found.certified
    values = game.losses(*game.blocks())
    torch.testing.assert_close(values[0].float(), ((first(x.float()) - 0.1 * second(x.float())) ** 2).mean())
    dropout = nn.Dropout()
    noisy = NetworkGame(lambda: [dropout(first(x)).mean(), second(x).mean()], [first, second])
    with pytest.raises(ValueError, match="losses must be deterministic"):
        certify(noisy, noisy.blocks())
    with pytest.raises(ValueError, match="players must be 2 or more"):
        NetworkGame(losses, [first])


def test_bad_games() -> None:
    with pytest.raises(ValueError, match="own must have a matrix for each"):
        QuadraticGame([[[1.0]]], [[None]])
    with pytest.raises(ValueError, match=r"own\[1\] must be a symmetric matrix"):
        QuadraticGame([[[1.0]], [[1.0, 2.0], [0.0, 1.0]]], [[None, None], [None, None]])
    with pytest.raises(ValueError, match=r"coupling\[0\]\[1\] must be of shape"):
        QuadraticGame([[[1.0]], [[1.0]]], [[None, [[1.0, 2.0]]], [None, None]])
    for arguments, message in (
        ({"gamma": 1.0}, "gamma"),
        ({"tau": -1.0}, "tau"),
        ({"start": 2}, "start must be a state"),
    ):
        with pytest.raises(ValueError, match=message):
            MarkovGame(**arguments)
    with pytest.raises(ValueError, match="transitions must be probabilities"):
        MarkovGame([[[[1.0, 1.0]]], [[[1.0, 1.0]]]])


def _bounds_on_rank(rank: int) -> list[list[float]]:
    game = MarkovGame()
    found = certify(game, [torch.zeros(4)] * 2, metric=game.fisher_metric, num_points=9)
    return [found.weights.tolist(), [found.margin, found.lipschitz, found.euclidean_margin], found.bounds.mu.tolist()]


def test_ranks_share_the_points() -> None:
    alone = _bounds_on_rank(0)
    assert [pytest.approx(part) for part in alone] == run_ranks(_bounds_on_rank, 2)[1]
