"""A set that all parameters of a group share is never left; starts outside of a set are projected, with a warning."""

import warnings

import pytest
import torch
from torch import nn

from lit_methods.optim import (
    Ball,
    Box,
    ImplicitOMD,
    L1Ball,
    OptimisticEnsemble,
    OptimisticFTL,
    OptimisticFTRL,
    OptimisticOMD,
    OptimisticOnlineNewton,
    Simplex,
)

MAKERS = {
    "omd": lambda params, radius: OptimisticOMD(params, 3.0, constraint=Ball(radius), average=True),
    "constant": lambda params, radius: OptimisticOMD(params, 0.7, step_size="constant", constraint=Ball(radius)),
    "adagrad": lambda params, radius: OptimisticOMD(
        params, 0.7, step_size="constant", mirror="adagrad", constraint=Ball(radius)
    ),
    "ftrl": lambda params, radius: OptimisticFTRL(params, 3.0, constraint=Ball(radius)),
    "ftl": lambda params, radius: OptimisticFTL(params, strong_convexity=0.3, constraint=Ball(radius)),
    "ensemble": lambda params, radius: OptimisticEnsemble(params, horizon=4, constraint=Ball(radius)),
    "newton": lambda params, radius: OptimisticOnlineNewton(params, radius=radius, epsilon=0.3),
    "implicit": lambda params, radius: ImplicitOMD(params, 3.0, constraint=Ball(radius)),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def play(optimizer, p, gradients):
    """Rounds on linear losses of ``p``."""
    for g in gradients:

        def closure(g=g):
            optimizer.zero_grad()
            loss = (g * p).sum()
            loss.backward()
            return loss

        optimizer.step(closure)


@every
def test_the_others_play_in_the_slice_that_a_parameter_without_gradient_leaves(make):
    gradients = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.tensor([0.1, 0.0, 0.2], dtype=torch.float64)
    moving, staying = nn.Parameter(start.clone()), nn.Parameter(torch.tensor([0.0, 0.6], dtype=torch.float64))
    alone = nn.Parameter(start.clone())
    play(make([staying, moving], 1.0), moving, gradients)
    play(make([alone], 0.8), alone, gradients)  # 0.6^2 + 0.8^2 = 1
    assert staying.tolist() == [0.0, 0.6]
    torch.testing.assert_close(moving, alone, rtol=1e-9, atol=1e-9)


@every
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float64, torch.float32)])
def test_parameters_that_take_turns_stay_inside_together(make, dtypes):
    params = [nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in dtypes]
    optimizer = make(params, 1.0)
    for turn in (0, 1, 0, 1, 0, 0, 1):
        p = params[turn]
        play(optimizer, p, -torch.ones(1, 3, dtype=p.dtype))
        norm = torch.cat([p.detach().double() for p in params]).norm()
        assert float(norm) <= 1 + 1e-6
        assert p.dtype == dtypes[turn]
    assert float(norm) == pytest.approx(1, abs=1e-3)
    if isinstance(optimizer, OptimisticOMD) and optimizer._average:
        assert float(torch.cat([x.double() for x in optimizer.averaged_parameters()]).norm()) <= 1 + 1e-6


def test_nothing_is_left_when_the_others_lie_on_the_sphere():
    on_sphere, other = nn.Parameter(torch.tensor([1.0, 0.0])), nn.Parameter(torch.zeros(2))
    for mirror in ("euclidean", "adagrad"):
        optimizer = OptimisticOMD([on_sphere, other], 1.0, step_size="constant", mirror=mirror, constraint=Ball(1.0))
        play(optimizer, other, torch.ones(3, 2))
        assert other.tolist() == [0.0, 0.0]


def test_averages_count_the_rounds_in_which_a_parameter_stays():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = OptimisticOMD([a, b], 1.0, step_size="constant", optimism="none", average=True)
    play(optimizer, b, -torch.ones(1, 1))  # b plays 0, then 1
    play(optimizer, a, -torch.ones(3, 1))
    assert [float(x) for x in optimizer.averaged_parameters()] == pytest.approx([3 / 4, 3 / 4])


def test_a_ball_of_its_own_for_each_parameter_is_not_shared():
    still, other = nn.Parameter(torch.tensor([1.0, 0.0])), nn.Parameter(torch.zeros(2))
    play(OptimisticOMD([still, other], 9.0, constraint=Ball(1.0, per_tensor=True)), other, -torch.ones(3, 2))
    assert float(other.detach().norm()) == pytest.approx(1)


def test_steps_of_their_own_in_a_shared_ball_are_refused():
    with pytest.raises(ValueError, match="per_tensor=True for per_parameter=True"):
        OptimisticOMD([nn.Parameter(torch.zeros(2))], constraint=Ball(1.0), per_parameter=True)


@every
def test_a_start_outside_is_projected_with_a_warning(make):
    params = [nn.Parameter(torch.full((2,), 3.0)) for _ in range(2)]
    with pytest.warns(UserWarning, match="outside the constraint set"):
        make(params, 1.0)
    assert float(torch.cat([p.detach() for p in params]).norm()) == pytest.approx(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(params, 1.0)


@pytest.mark.parametrize("constraint", [Box(0.0, 1.0), Simplex(), L1Ball(1.0), lambda x: x.clamp(max=1.0)])
@pytest.mark.parametrize("kind", [OptimisticOMD, OptimisticFTRL, OptimisticFTL, OptimisticEnsemble, ImplicitOMD])
def test_a_start_outside_of_any_set_warns(kind, constraint):
    with pytest.warns(UserWarning, match="outside the constraint set"):
        kind([nn.Parameter(torch.full((3,), 2.0))], constraint=constraint)


@pytest.mark.parametrize("kind", [OptimisticOMD, OptimisticFTRL, OptimisticFTL, OptimisticEnsemble, ImplicitOMD])
def test_a_ball_whose_orthogonal_projection_is_not_known_is_refused(kind):
    with pytest.raises(ValueError, match=r"Ball with norm=2\.0 for the mirror map Euclidean, got 1\.5"):
        kind([nn.Parameter(torch.zeros(3))], constraint=Ball(1.0, norm=1.5))
