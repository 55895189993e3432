"""One transport problem over two ranks against the same problem in one process."""

import pytest
import torch
from torch import Tensor

from lit_methods.transport import OTLoss, point_cost, sinkhorn_newton
from tests.distributed.launch import run_ranks

F64 = torch.float64
LOSSES = [
    {"eta": 3.0, "p": 1},
    {"eta": 2.0, "debias": True},
    {"eta": 3.0, "value": "transport"},
    {"eta": 2.0, "debias": True, "tiled": True},
]


def inputs(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    shapes = (2, 9, 3), (2, 7, 3), (2, 9), (2, 7)
    return [torch.randn(shape, dtype=F64, generator=generator).requires_grad_() for shape in shapes]


def costs(rank: int) -> Tensor:
    """A rank's rows of a problem whose Hessian is sparse at eta = 300 and not at 20."""
    return torch.rand((150, 250)[rank], 300, dtype=F64, generator=torch.Generator().manual_seed(10 + rank))


def on_a_rank(rank: int) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    losses = []
    for settings in LOSSES:
        x, y, a, b = inputs(rank)
        loss = OTLoss(**settings, gather=True, reduction="none")(x, y, a.softmax(-1), b.softmax(-1))
        losses.append([loss.detach(), *torch.autograd.grad(loss.sum(), (x, y, a, b))])
    solutions = []
    for eta in (20.0, 300.0):
        cost = costs(rank).requires_grad_()
        result = sinkhorn_newton(cost, eta=eta, row_sharded=True, warmup=3)
        (gradient,) = torch.autograd.grad((result.plan[:, :5] * cost.detach()[:, :5]).sum() + result.g[3], cost)
        solutions.append([gradient, *(x.detach() for x in result)])
    return losses, solutions


@pytest.fixture(scope="module")
def ranks() -> list[tuple[list[list[Tensor]], list[list[Tensor]]]]:
    return run_ranks(on_a_rank, 2)


@pytest.mark.parametrize("case", range(len(LOSSES)))
def test_gathered_losses_and_their_gradients_are_those_of_the_joint_problem(case, ranks):
    x, y, a, b = (torch.cat([first, second], 1) for first, second in zip(inputs(0), inputs(1), strict=True))
    weights = [torch.cat([w.softmax(-1) / 2 for w in halves], 1) for halves in (a.chunk(2, 1), b.chunk(2, 1))]
    loss = OTLoss(**LOSSES[case], reduction="none")(x, y, *weights)
    gradients = torch.autograd.grad(2 * loss.sum(), (x, y, a, b))  # each of two ranks differentiates the loss
    for rank in range(2):
        found, *found_gradients = ranks[rank][0][case]
        torch.testing.assert_close(found, loss.detach(), atol=1e-11, rtol=0)
        for expected, gradient in zip(gradients, found_gradients, strict=True):
            torch.testing.assert_close(gradient, expected.chunk(2, 1)[rank], atol=1e-7, rtol=0)


@pytest.mark.parametrize(("case", "eta"), [(0, 20.0), (1, 300.0)])
def test_sharded_rows_give_the_plan_and_gradients_of_the_whole(case, eta, ranks):
    cost = torch.cat([costs(0), costs(1)]).requires_grad_()
    whole = sinkhorn_newton(cost, eta=eta, warmup=3)
    objective = (whole.plan[:, :5] * cost.detach()[:, :5]).sum() + 2 * whole.g[3]  # on both ranks
    (expected,) = torch.autograd.grad(objective, cost)
    assert whole.n_newton > 0
    for rank, rows in enumerate((slice(0, 150), slice(150, 400))):
        gradient, plan, f, g, value, transported, *_, converged = ranks[rank][1][case]
        assert converged
        torch.testing.assert_close(plan, whole.plan.detach()[rows], atol=1e-10, rtol=0)
        torch.testing.assert_close(f, whole.f.detach()[rows], atol=1e-8, rtol=0)
        torch.testing.assert_close(g, whole.g.detach(), atol=1e-8, rtol=0)
        torch.testing.assert_close(value, whole.value.detach(), atol=1e-10, rtol=0)
        torch.testing.assert_close(transported, whole.cost.detach(), atol=1e-10, rtol=0)
        torch.testing.assert_close(gradient, expected[rows], atol=1e-6, rtol=1e-4)
    for first, second in zip(ranks[0][1][case][3:], ranks[1][1][case][3:], strict=True):
        assert torch.equal(first, second)


def test_without_a_process_group_sharded_rows_are_all_rows():
    cost = point_cost(*inputs(0)[:2]).detach()
    assert torch.equal(sinkhorn_newton(cost, eta=3.0, row_sharded=True).plan, sinkhorn_newton(cost, eta=3.0).plan)
