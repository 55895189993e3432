import pytest
import torch
from torch import nn

from lit_methods.optim import ExtraAdam, ExtraGradient


def bilinear(make, rounds):
    x, y = (nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in range(2))
    optimizer = make([{"params": [x]}, {"params": [y], "maximize": True}])

    def closure():
        optimizer.zero_grad()
        (x * y).backward()
        return (x * y).detach()

    for _ in range(rounds):
        optimizer.step(closure)
    return torch.stack([x.detach(), y.detach()])


def test_bilinear_game_has_a_closed_form():
    """x - lr (y + lr x), y + lr (x - lr y): the norm shrinks by (1 - lr^2)^2 + lr^2 a round; the card's 0.00977."""
    z = bilinear(lambda groups: ExtraGradient(groups, 0.1), 1000)
    assert float(z.norm()) == pytest.approx(2**0.5 * (0.99**2 + 0.01) ** 500, rel=1e-10)
    assert float(z.norm()) == pytest.approx(0.00977, abs=5e-6)


def test_extra_adam_closes_in():
    assert float(bilinear(lambda groups: ExtraAdam(groups, 0.01), 3000).norm()) < 0.1


@pytest.mark.parametrize("make", [lambda ps: ExtraGradient(ps, 0.1), lambda ps: ExtraAdam(ps, 0.1)])
def test_closure_and_two_calls_do_the_same(make):
    ends = []
    for with_closure in (True, False):
        p = nn.Parameter(torch.tensor([1.0, 2.0]))
        optimizer = make([p])

        def closure(p=p, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (p**4).sum()
            loss.backward()
            return loss

        for _ in range(3):
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.extrapolation()
                closure()
                optimizer.step()
        ends.append(p.detach())
        assert "origin" not in optimizer.state[p]
    assert torch.equal(*ends)


def test_misuse_is_named():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = ExtraGradient([p])
    with pytest.raises(RuntimeError, match="needs extrapolation"):
        optimizer.step()
    optimizer.extrapolation()
    with pytest.raises(RuntimeError, match="called twice"):
        optimizer.extrapolation()


@pytest.mark.parametrize("make", [ExtraGradient, ExtraAdam])
@pytest.mark.parametrize("bad", ["look-ahead", "step"])
def test_a_round_with_a_bad_gradient_ends_where_it_began(make, bad):
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make([p], lr=0.1)

    def play(bad=None):
        for move, take in (("look-ahead", optimizer.extrapolation), ("step", optimizer.step)):
            optimizer.zero_grad()
            (p.square().sum() * (torch.nan if move == bad else 1.0)).backward()
            take()

    with pytest.warns(RuntimeWarning, match="skipped a step"):
        play(bad)
    assert p.tolist() == [1.0, -2.0]
    play()
    assert p.isfinite().all()
    assert p.detach().abs().sum() < 3
