import math
import warnings

import pytest
import torch
from torch import Tensor

from lit_methods.games.preference import (
    exploitability,
    nash_md,
    prox_step,
    regularized_nash,
    solve_preference_game,
)

RPS = torch.tensor([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]], dtype=torch.float64)
REF = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()


def random_game(n: int, seed: int, *batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(*batch, n, n, dtype=torch.float64, generator=generator)
    log_ref = torch.randn(*batch, n, dtype=torch.float64, generator=generator).log_softmax(-1)
    return torch.sigmoid(scores - scores.mT), log_ref


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_prox_step_maximises_its_objective() -> None:
    pref, log_ref = random_game(5, 0)
    center, opponent = random_game(5, 1)[1], random_game(5, 2)[1]
    beta, eta = 0.3, 0.7
    solution = prox_step(pref, center, opponent, log_ref, beta, eta)

    def objective(logits: Tensor) -> Tensor:
        log_pi = logits.log_softmax(-1)
        win = log_pi.exp() @ pref @ opponent.exp()
        return win - beta * kl(log_pi, log_ref) - beta / eta * kl(log_pi, center)

    logits = solution.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(logits), logits)
    assert slope.abs().max() < 1e-14
    for seed in range(20):
        assert objective(random_game(5, 100 + seed)[1]) < objective(solution)
    # an infinite step is the plain regularised best answer
    best = (log_ref + pref @ opponent.exp() / beta).log_softmax(-1)
    torch.testing.assert_close(prox_step(pref, center, opponent, log_ref, beta, math.inf), best)


@pytest.mark.parametrize("beta", [0.01, 0.05, 0.1, 0.5])
@pytest.mark.parametrize("n", [3, 20, 60])
def test_nash_mp_stays_under_its_bound(n: int, beta: float) -> None:
    pref, log_ref = random_game(n, n, 7)
    equilibrium = regularized_nash(pref, log_ref, beta)
    path = solve_preference_game(pref, log_ref, beta, num_iterations=60, return_trajectory=True)
    gaps = kl(equilibrium, path)
    bound = (1 + 2 * beta) ** -torch.arange(61.0, dtype=torch.float64).unsqueeze(-1) * gaps[0]
    assert (gaps <= bound * (1 + 1e-9) + 1e-14).all()


@pytest.mark.parametrize("eta", [0.02, 0.5, 2.0])
def test_exact_proximal_point_contracts_for_any_eta(eta: float) -> None:
    pref, log_ref = random_game(12, 3, 5)
    equilibrium = regularized_nash(pref, log_ref, 0.05)
    path = solve_preference_game(
        pref, log_ref, 0.05, eta=eta, num_inner=None, num_iterations=15, return_trajectory=True
    )
    gaps = kl(equilibrium, path)
    assert (gaps[1:] <= gaps[:-1] / (1 + eta) + 1e-13).all()
    # many prox steps solve the same implicit equation wherever they contract
    if eta == 0.02:
        iterated = solve_preference_game(pref, log_ref, 0.05, eta=eta, num_inner=60, num_iterations=15)
        torch.testing.assert_close(iterated, path[-1], atol=1e-10, rtol=0)


def test_rock_paper_scissors_numbers_of_the_card() -> None:
    equilibrium = regularized_nash(RPS, REF, 0.01)
    assert (kl(equilibrium, solve_preference_game(RPS, REF, 0.01, num_iterations=50))) < 1e-5
    assert (kl(equilibrium, solve_preference_game(RPS, REF, 0.01, num_iterations=100))) < 2e-10
    cycling = kl(
        equilibrium, solve_preference_game(RPS, REF, 0.01, num_inner=1, num_iterations=200, return_trajectory=True)
    )
    assert cycling[20] > 0.8
    assert cycling[-50:].min() > cycling[20]
    assert kl(equilibrium, nash_md(RPS, REF, 0.01, eta=0.5, num_iterations=400)) > 0.2


def test_small_steps_do_not_rescue_self_play() -> None:
    pref, _ = random_game(50, 1)
    log_ref = torch.full((50,), -math.log(50), dtype=torch.float64)
    equilibrium = regularized_nash(pref, log_ref, 0.01)
    ours = kl(equilibrium, solve_preference_game(pref, log_ref, 0.01, num_iterations=200))
    slow = kl(equilibrium, solve_preference_game(pref, log_ref, 0.01, eta=4e-4, num_inner=1, num_iterations=800))
    assert ours < 0.01 * slow


@pytest.mark.parametrize(("n", "beta"), [(3, 1e-3), (3, 0.01), (50, 0.01), (200, 0.1)])
def test_newton_solves_the_fixed_point(n: int, beta: float) -> None:
    pref, log_ref = random_game(n, n + 1, 4)
    log_pi = regularized_nash(pref, log_ref, beta)
    best = (log_ref + (pref @ log_pi.exp().unsqueeze(-1)).squeeze(-1) / beta).log_softmax(-1)
    torch.testing.assert_close(log_pi, best, atol=1e-9, rtol=0)
    assert exploitability(pref, log_pi, log_ref, beta).abs().max() < 1e-12
    torch.testing.assert_close(log_pi[2], regularized_nash(pref[2], log_ref[2], beta), atol=1e-9, rtol=0)


def test_exploitability_is_the_gain_of_the_best_answer() -> None:
    pref, log_ref = random_game(6, 5, 3)
    log_pi = random_game(6, 6, 3)[1]
    beta = 0.2
    best = (log_ref + (pref @ log_pi.exp().unsqueeze(-1)).squeeze(-1) / beta).log_softmax(-1)
    value = (best.exp().unsqueeze(-2) @ pref @ log_pi.exp().unsqueeze(-1)).squeeze(-1).squeeze(-1)
    gain = value - beta * kl(best, log_ref) + beta * kl(log_pi, log_ref) - 0.5
    torch.testing.assert_close(exploitability(pref, log_pi, log_ref, beta), gain)
    assert (gain > 0).all()


def test_limits() -> None:
    coin = torch.full((4, 4), 0.5, dtype=torch.float64)
    log_ref = random_game(4, 9)[1]
    torch.testing.assert_close(solve_preference_game(coin, log_ref, 0.1), log_ref, atol=1e-12, rtol=0)
    pref, _ = random_game(4, 9)
    torch.testing.assert_close(solve_preference_game(pref, log_ref, 1e9), log_ref, atol=1e-8, rtol=0)
    scores = torch.tensor([0.1, 2.0, -1.0, 0.5], dtype=torch.float64)
    bradley_terry = torch.sigmoid(scores.unsqueeze(1) - scores)
    assert regularized_nash(bradley_terry, log_ref, 1e-3).argmax() == 1
    uniform = torch.full((3,), -math.log(3), dtype=torch.float64)
    torch.testing.assert_close(solve_preference_game(RPS, uniform, 0.01), uniform)


def test_batched_games_equal_single_ones_and_gradients_flow() -> None:
    pref, log_ref = random_game(5, 11, 2, 3)
    batched = solve_preference_game(pref, log_ref, 0.1, num_iterations=9)
    torch.testing.assert_close(batched[1, 2], solve_preference_game(pref[1, 2], log_ref[1, 2], 0.1, num_iterations=9))
    assert torch.autograd.gradcheck(
        lambda ref: prox_step(pref[0, 0], log_ref[0, 1], log_ref[0, 2], ref, 0.1, 0.2),
        log_ref[0, 0].clone().requires_grad_(),
    )


def test_bad_arguments_name_themselves() -> None:
    with pytest.raises(ValueError, match="beta=0"):
        solve_preference_game(RPS, REF, 0.0)
    with pytest.raises(ValueError, match="eta=-1"):
        solve_preference_game(RPS, REF, 0.1, eta=-1.0)
    with pytest.raises(ValueError, match="square"):
        solve_preference_game(RPS[:2], REF, 0.1)
    with pytest.raises(ValueError, match=r"pref \+ pref.mT"):
        solve_preference_game(RPS * 0.9, REF, 0.1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        solve_preference_game(RPS * 3 - 1, REF, 0.1)
    with pytest.raises(ValueError, match="finite"):
        solve_preference_game(RPS, torch.tensor([0.0, 1.0, 0.0]).log(), 0.1)
    with pytest.raises(ValueError, match="num_inner=0"):
        solve_preference_game(RPS, REF, 0.1, num_inner=0)
    with pytest.raises(ValueError, match="eta=20"):
        nash_md(RPS, REF, 0.1, eta=20.0)
    with pytest.warns(UserWarning, match="above 2"):
        diverged = solve_preference_game(RPS, REF, 0.01, eta=0.1, num_iterations=300)
    assert kl(regularized_nash(RPS, REF, 0.01), diverged) > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve_preference_game(RPS, REF, 0.01, num_iterations=1)
