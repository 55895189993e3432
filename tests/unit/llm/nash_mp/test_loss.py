"""Expected gradients by enumeration: every outcome of every draw, weighted by its probability."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_methods.llm.nash_mp.loss import group_preference_advantage, group_win_rates, nash_prox_loss, rloo

VOCABULARY, LENGTH = 3, 2
SEQUENCES = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
END = 0  # a response ends at its first 0, so sequences have lengths 1 and 2
MASK = torch.stack([torch.ones(9, dtype=torch.bool), SEQUENCES[:, 0] != END], dim=1)
# one representative of each distinct response
DISTINCT = torch.tensor([0, 3, 4, 5, 6, 7, 8])


def model(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(VOCABULARY, dtype=torch.float64, generator=generator)
    second = torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64, generator=generator)
    return first, second


def token_logps(logits: tuple[Tensor, Tensor]) -> Tensor:
    """Per-token log-probabilities of the 7 responses, (7, 2); zero after the end."""
    first, second = (part.log_softmax(-1) for part in logits)
    tokens = SEQUENCES[DISTINCT]
    return torch.stack([first[tokens[:, 0]], second[tokens[:, 0], tokens[:, 1]]], dim=1) * MASK[DISTINCT]


def game() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    scores = torch.randn(7, 7, dtype=torch.float64, generator=generator) * 2
    pref = torch.sigmoid(scores - scores.T)
    ref, target, opponent = (token_logps(model(seed)) for seed in (1, 2, 3))
    return pref, ref, target, opponent, MASK[DISTINCT]


def exact_gradient(
    pref: Tensor, ref: Tensor, target: Tensor, opponent: Tensor | None, beta: float, eta: float
) -> Tensor:
    logits = tuple(part.requires_grad_() for part in model(0))
    logps = token_logps(logits).sum(1)
    probs = logps.exp()
    rival = probs.detach() if opponent is None else opponent.sum(1).exp()
    objective = probs @ pref @ rival - beta * (probs * (logps - ref.sum(1))).sum()
    if not math.isinf(eta):
        objective = objective - beta / eta * (probs * (logps - target.sum(1))).sum()
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(-objective, logits)])


def groups(size: int) -> Iterator[tuple[int, ...]]:
    yield from itertools.product(range(7), repeat=size)


def expected_gradient(size: int, num_opponents: int, beta: float, eta: float, **options: str) -> Tensor:
    pref, ref, target, opponent, mask = game()
    logits = tuple(part.requires_grad_() for part in model(0))
    logps = token_logps(logits)
    probs = logps.detach().sum(1).exp()
    rows = torch.tensor(list(groups(size)))
    weight = probs[rows].prod(1)
    if num_opponents:
        rivals = torch.tensor(list(groups(num_opponents)))
        weight = (weight.unsqueeze(1) * opponent.sum(1).exp()[rivals].prod(1)).flatten()
        pairs = pref[rows[:, None, :, None], rivals[None, :, None, :]].flatten(0, 1)
        rows = rows.repeat_interleave(len(rivals), 0)
    else:
        pairs = pref[rows[:, :, None], rows[:, None, :]]
    # the loss is a mean over prompts: one outcome per "prompt", each weighted by its probability
    total = torch.zeros(len(torch.cat([part.flatten() for part in logits])), dtype=torch.float64)
    for start in range(0, len(rows), 4000):
        part = slice(start, start + 4000)
        picked = logps[rows[part]]
        scaled = [
            nash_prox_loss(
                picked[i : i + 1], ref[rows[part]][i : i + 1], target[rows[part]][i : i + 1], pairs[part][i : i + 1],
                mask[rows[part]][i : i + 1], beta=beta, eta=eta, group_self_play=not num_opponents, **options,
            )[0] * weight[part][i]
            for i in range(len(picked))
        ]  # fmt: skip
        grads = torch.autograd.grad(torch.stack(scaled).sum(), logits, retain_graph=True)
        total += torch.cat([grad.flatten() for grad in grads])
    return total


@pytest.mark.parametrize(
    "options", [{"loss_type": "reinforce"}, {"loss_type": "reinforce_to_go"}, {"loss_type": "ipo"}]
)
@pytest.mark.parametrize(("size", "num_opponents"), [(2, 0), (3, 0), (2, 1), (2, 2)])
@pytest.mark.parametrize("eta", [0.5, math.inf])
def test_expected_gradient_is_exact(options: dict[str, str], size: int, num_opponents: int, eta: float) -> None:
    pref, ref, target, opponent, _ = game()
    exact = exact_gradient(pref, ref, target, opponent if num_opponents else None, 0.3, eta)
    torch.testing.assert_close(expected_gradient(size, num_opponents, 0.3, eta, **options), exact, atol=1e-12, rtol=0)


def test_leave_one_out_would_be_wrong_in_group_self_play(monkeypatch: pytest.MonkeyPatch) -> None:
    pref, ref, target, _, _ = game()
    exact = exact_gradient(pref, ref, target, None, 0.3, 0.5)
    monkeypatch.setattr(
        "lit_methods.llm.nash_mp.loss.group_preference_advantage", lambda pref: rloo(group_win_rates(pref))
    )
    trapped = expected_gradient(2, 0, 0.3, 0.5)
    assert (trapped - exact).norm() / exact.norm() > 0.1
    # the trap doubles the preference at B = 2: exactly the gradient at half the regularisation, times two
    halved = exact_gradient(pref, ref, target, None, 0.15, 0.5) * 2
    torch.testing.assert_close(trapped, halved, atol=1e-12, rtol=0)


def test_win_rates_of_a_group_sum_to_half_its_size() -> None:
    scores = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0))
    pref = torch.sigmoid(scores - scores.mT)
    torch.testing.assert_close(group_win_rates(pref).sum(1), torch.full((5,), 2.0))
    torch.testing.assert_close(group_preference_advantage(pref).sum(1), torch.zeros(5), atol=1e-6, rtol=0)


def test_indifferent_judge_and_equal_policies_give_no_gradient() -> None:
    logps = torch.randn(2, 4, 3, requires_grad=True)
    mask = torch.ones(2, 4, 3, dtype=torch.bool)
    coin = torch.full((2, 4, 4), 0.5)
    for loss_type in ("reinforce", "ipo"):
        loss, metrics = nash_prox_loss(
            logps, logps.detach(), logps.detach(), coin, mask, beta=0.1, eta=0.25, loss_type=loss_type
        )
        (grad,) = torch.autograd.grad(loss, logps)
        assert grad.abs().max() == 0
        assert metrics["kl/ref"] == 0
        assert metrics["preference/spread"] == 0


def test_metrics_ignore_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    logps, ref, target = (-torch.rand(2, 3, 4, generator=generator) for _ in range(3))
    mask = torch.arange(4) < torch.tensor([[2, 4, 1], [3, 3, 2]]).unsqueeze(2)
    pref = torch.full((2, 3, 3), 0.5)
    metrics = nash_prox_loss(logps, ref, target, pref, mask, beta=0.1, eta=0.3)[1]
    torch.testing.assert_close(metrics["kl/ref"], ((logps - ref) * mask).sum() / 6)
    noisy = logps.masked_fill(~mask, 99.0)
    again = nash_prox_loss(noisy, ref.masked_fill(~mask, -99.0), target, pref, mask, beta=0.1, eta=0.3)[1]
    for name, value in metrics.items():
        torch.testing.assert_close(again[name], value)


def test_bad_arguments() -> None:
    one = torch.zeros(2, 1, 3)
    mask = torch.ones(2, 1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="samples_per_prompt must be >= 2, got 1"):
        nash_prox_loss(one, one, one, torch.zeros(2, 1, 1), mask, beta=0.1, eta=1.0)
    with pytest.raises(ValueError, match="samples_per_prompt must be >= 2, got 1"):
        nash_prox_loss(one, one, one, torch.zeros(2, 1, 5), mask, beta=0.1, eta=1.0, group_self_play=False)
    with pytest.raises(ValueError, match="one group"):
        nash_prox_loss(one, one, one, torch.zeros(2, 1, 5), mask, beta=0.1, eta=1.0)


def test_metrics_of_the_kl_terms() -> None:
    torch.manual_seed(0)
    logps, ref, target = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 3, 4) < 0.7
    pref = torch.full((2, 3, 3), 0.5, dtype=torch.float64)
    _, metrics = nash_prox_loss(logps, ref, target, pref, mask, beta=0.1, eta=0.5)
    ratio = logps - ref
    torch.testing.assert_close(metrics["kl/ref"], (ratio * mask).sum(2).mean())
    # Schulman's k3: r - 1 - log r with r = ref / pi
    torch.testing.assert_close(metrics["kl/ref_k3"], (((-ratio).exp() - 1 + ratio) * mask).sum(2).mean())
    torch.testing.assert_close(metrics["kl/target"], ((logps - target) * mask).sum(2).mean())


@pytest.mark.parametrize("loss_type", ["reinforce", "reinforce_to_go", "ipo"])
def test_a_target_counts_with_a_finite_eta_only(loss_type: Any) -> None:
    torch.manual_seed(0)
    logps, ref, target = (torch.randn(2, 3, 4) for _ in range(3))
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    pref = torch.full((2, 3, 3), 0.5)

    def loss(target: Any, eta: float) -> Any:
        return nash_prox_loss(logps, ref, target, pref, mask, beta=0.1, eta=eta, loss_type=loss_type)

    given, metrics = loss(target, math.inf)
    assert given == loss(None, math.inf)[0] != loss(target, 1.0)[0]
    assert metrics["kl/target"] == 0
    with pytest.raises(ValueError, match=r"target_logps must be given with a finite eta, got None with eta=1\.0"):
        loss(None, 1.0)


@pytest.mark.parametrize("loss_type", ["reinforce", "reinforce_to_go"])
def test_which_kl_a_token_is_charged(loss_type: Any) -> None:
    """Against loops over tokens: that of its whole response, or of itself and of what follows."""
    torch.manual_seed(0)
    logps, ref, target = (torch.randn(1, 3, 4, dtype=torch.float64) for _ in range(3))
    pref = torch.full((1, 3, 3), 0.5, dtype=torch.float64)
    loss, _ = nash_prox_loss(
        logps, ref, target, pref, torch.ones(1, 3, 4, dtype=torch.bool), beta=0.2, eta=0.5, loss_type=loss_type
    )
    charge = 0.2 * (logps - ref)[0] + 0.2 / 0.5 * (logps - target)[0]
    expected = 0.0
    for i in range(3):
        for t in range(4):
            first = t if loss_type == "reinforce_to_go" else 0
            others = sum(charge[j, first:].sum() for j in range(3) if j != i) / 2
            expected += float((charge[i, first:].sum() - others) * logps[0, i, t]) / 3
    assert float(loss) == pytest.approx(expected, rel=1e-10)


def test_former_spelling_warns_and_means_the_same() -> None:
    torch.manual_seed(0)
    logps, ref, target = (torch.randn(2, 3, 4) for _ in range(3))
    arguments: Any = (logps, ref, target, torch.full((2, 3, 3), 0.5), torch.ones(2, 3, 4, dtype=torch.bool))
    with pytest.warns(FutureWarning, match='loss_type="reinforce_to_go"'):
        former = nash_prox_loss(*arguments, beta=0.1, eta=1.0, kl_credit="to_go")[0]
    assert former == nash_prox_loss(*arguments, beta=0.1, eta=1.0, loss_type="reinforce_to_go")[0]
