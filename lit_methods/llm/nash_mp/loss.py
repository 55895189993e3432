"""The loss of one prox step on a parametric policy: regularised preference game, Monte Carlo, both players sampled.

For a prompt, with ``y ~ pi`` and an opponent ``y' ~ o``, a prox step maximises ``E[P(y > y')] - beta KL(pi | ref) -
beta / eta KL(pi | target)``. The estimators below are unbiased, which the tests check by enumerating every outcome.
"""

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

LossType = Literal["reinforce", "reinforce_to_go", "ipo"]


def rloo(x: Tensor) -> Tensor:
    """Each entry minus the mean of the others, along dimension 1: ``(x - mean) B / (B - 1)``."""
    num = x.shape[1]
    if num < 2:
        raise ValueError(f"samples_per_prompt must be >= 2, got {num}: the baseline is the other samples' mean")
    return (x - x.mean(1, keepdim=True)) * (num / (num - 1))


def group_win_rates(pref: Tensor) -> Tensor:
    """How often each sample beats the other samples of its group.

    Args:
        pref: ``pref[p, i, j]`` is the probability that sample ``i`` of prompt ``p`` is preferred to ``j``,
            ``(P, B, B)``.

    Returns:
        ``(P, B)``; sums to ``B / 2`` in every group, whatever the samples.
    """
    num = pref.shape[1]
    if num < 2:
        raise ValueError(f"samples_per_prompt must be >= 2, got {num}: samples of a group play each other")
    return (pref.sum(2) - pref.diagonal(dim1=1, dim2=2)) / (num - 1)


def group_preference_advantage(pref: Tensor) -> Tensor:
    """Advantage of every sample in group self-play, ``(P, B, B) -> (P, B)``: win rate minus one half.

    A leave-one-out baseline would be wrong here: win rates of a group sum to ``B / 2``, so the others' mean contains
    the sample's own result and would scale the preference by ``B / (B - 1)``.
    """
    return group_win_rates(pref) - 0.5


def nash_prox_loss(
    logps: Tensor,
    ref_logps: Tensor,
    target_logps: Tensor | None,
    pref: Tensor,
    mask: Tensor,
    *,
    beta: float,
    eta: float = math.inf,
    loss_type: LossType = "reinforce",
    group_self_play: bool = True,
    kl_credit: Literal["sequence", "to_go"] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss whose expected gradient is that of the prox step's objective, with the sign of a loss.

    All loss types have the same expected gradient when the opponent is the policy. ``"reinforce"`` charges every token
    the KL of the whole response, ``"reinforce_to_go"`` that of itself and of what follows, which has less variance.
    ``"ipo"`` is the squared error of ``h(y_i) - h(y_j)`` against the preference, where ``h = beta log(pi / ref) +
    beta / eta log(pi / target)``, divided by ``4 (beta + beta / eta)``.

    Args:
        logps: log-probabilities of the policy's own samples, with gradient, ``(P, B, T)``.
        ref_logps: the same tokens under the reference, ``(P, B, T)``.
        target_logps: the same tokens under the centre of the prox step; not looked at, and may be ``None``, with
            ``eta=inf``.
        pref: preferences among the samples of a group ``(P, B, B)``, or over opponents' samples ``(P, B, K)``.
        mask: tokens that count, ``(P, B, T)``, bool.
        beta: strength of the KL regularisation, positive.
        eta: step size, positive; ``inf`` for no centre.
        loss_type: ``"reinforce"``, ``"reinforce_to_go"`` or ``"ipo"``.
        group_self_play: whether ``pref`` is among the samples themselves.
        kl_credit: former spelling, which warns: ``"to_go"`` is ``loss_type="reinforce_to_go"``.

    Returns:
        the loss, and detached metrics: ``kl/ref`` and ``kl/target`` per response (mean log-ratio), ``kl/ref_k3`` (its
        positive low-variance estimate), ``preference/spread`` (standard deviation of win rates within a group).

    Raises:
        ValueError: for fewer than 2 samples per prompt, shapes that do not fit, or a finite ``eta`` without
            ``target_logps``.
    """
    if kl_credit is not None:
        warnings.warn('nash_prox_loss: kl_credit="to_go" is now loss_type="reinforce_to_go"', FutureWarning)
        loss_type = "reinforce_to_go" if (loss_type, kl_credit) == ("reinforce", "to_go") else loss_type
    if group_self_play and pref.shape[1] != pref.shape[2]:
        raise ValueError(f"pref has shape {tuple(pref.shape)}, but group self-play compares samples of one group")
    logps = logps * mask
    ratio_ref = (logps.detach() - ref_logps) * mask
    if math.isinf(eta):
        prox, target_logps = 0.0, logps.detach()
    elif target_logps is None:
        raise ValueError(f"target_logps must be given with a finite eta, got None with eta={eta}")
    else:
        prox = beta / eta
    ratio_target = (logps.detach() - target_logps) * mask
    win_rates = group_win_rates(pref) if group_self_play else pref.mean(2)
    if loss_type != "ipo":
        advantage = group_preference_advantage(pref) if group_self_play else rloo(win_rates)
        penalty = beta * ratio_ref + prox * ratio_target
        if loss_type == "reinforce":
            weights = (advantage - rloo(penalty.sum(2))).unsqueeze(2)
        else:
            to_go = penalty.flip(2).cumsum(2).flip(2)
            weights = advantage.unsqueeze(2) - rloo(to_go)
        loss = -(weights * logps).sum(2).mean()
    else:
        pull = ((beta * (logps - ref_logps) + prox * (logps - target_logps)) * mask).sum(2)
        goal = pref - 0.5 if group_self_play else win_rates.unsqueeze(2) - win_rates.unsqueeze(1)
        first, second = torch.triu_indices(pref.shape[1], pref.shape[1], offset=1, device=pref.device)
        error = pull[:, first] - pull[:, second] - goal[:, first, second]
        loss = error.square().mean() / (4.0 * (beta + prox))
    kl_terms = torch.expm1(-ratio_ref) + ratio_ref
    metrics = {
        "kl/ref": ratio_ref.sum(2).mean(),
        "kl/ref_k3": (kl_terms * mask).sum(2).mean(),
        "kl/target": ratio_target.sum(2).mean(),
        "preference/spread": win_rates.std(1).mean(),
    }
    return loss, metrics
