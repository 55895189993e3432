import math

import torch

from lit_methods.datamodules import Mixture2DDataModule

DATA = Mixture2DDataModule(std=0.2, radius=1.5)
X = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_density_integrates_to_one_and_its_gradient_is_the_score() -> None:
    axis = torch.linspace(-6, 6, 400, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    total = DATA.log_prob(grid, 0.8, 0.3).exp().sum() * (axis[1] - axis[0]) ** 2
    torch.testing.assert_close(total, torch.ones((), dtype=torch.float64), rtol=1e-5, atol=0)
    alpha, sigma = torch.linspace(0.1, 0.9, 6).double(), torch.linspace(0.9, 0.2, 6).double()
    score = torch.func.grad(lambda x: DATA.log_prob(x, alpha, sigma).sum())(X)
    torch.testing.assert_close(DATA.score(X, alpha, sigma), score)
    # Tweedie's formula.
    mean = (X + sigma[:, None] ** 2 * score) / alpha[:, None]
    torch.testing.assert_close(DATA.posterior_mean(X, alpha, sigma), mean)


def test_the_flow_map_solves_the_flow_carries_the_density_and_composes() -> None:
    h = 1e-4
    slope = (DATA.flow_map(X, 0.5, 0.5 - h) - DATA.flow_map(X, 0.5, 0.5 + h)) / (-2 * h)
    torch.testing.assert_close(slope, DATA.velocity(X, 0.5, 0.5, -1.0, 1.0), rtol=1e-6, atol=1e-6)
    straight = DATA.flow_map(X, 0.9, 0.1)
    torch.testing.assert_close(DATA.flow_map(DATA.flow_map(X, 0.9, 0.4), 0.4, 0.1), straight, rtol=1e-6, atol=1e-6)
    jacobian = torch.stack([torch.func.jacrev(lambda x: DATA.flow_map(x[None], 0.9, 0.1)[0])(x) for x in X[:2]])
    change = DATA.log_prob(X[:2], 0.1, 0.9) - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(DATA.log_prob(straight[:2], 0.9, 0.1), change, rtol=1e-5, atol=1e-5)


def test_points_follow_the_density() -> None:
    DATA.setup("fit")
    assert DATA.train_data is not None
    x, y = DATA.train_data
    assert torch.bincount(y).min() > 0.8 * len(y) / 8
    entropy = math.log(8) + math.log(2 * math.pi * math.e * 0.04)
    assert abs(-float(DATA.log_prob(x.double()).mean()) - entropy) < 0.05
