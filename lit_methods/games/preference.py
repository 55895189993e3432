"""KL-regularised preference games in closed form: Nash-MP, Nash Prox, mirror descent, Nash-MD and a Newton reference.

Two players pick one of ``n`` actions; ``pref[i, j]`` is the probability that action ``i`` is preferred to ``j``. The
first player maximises ``P(pi > pi') - beta KL(pi | ref) + beta KL(pi' | ref)``, the second minimises it. The game is
symmetric, so there is one Nash equilibrium ``pi*`` and it solves ``log pi* = log ref + P pi* / beta + const``.

Nash-MP is from Tiapkin et al., "Accelerating Nash Learning from Human Feedback via Mirror Prox" (arXiv 2505.19731 v1),
Nash Prox from its second version, "Proximal Point Nash Learning from Human Feedback"; both abstracts give the rates,
the update written out here was derived from the definition of mirror prox. Nash-MD is from Munos et al. (2312.00886).

Everything works on log-probabilities and on any number of leading batch dimensions (one per context, game or seed).
"""

import math
import warnings

import torch
from torch import Tensor


def prox_step(
    pref: Tensor, log_center: Tensor, log_opponent: Tensor, log_ref: Tensor, beta: float, eta: float
) -> Tensor:
    r"""Best answer to an opponent that stays near the reference and near a centre.

    Solves :math:`\arg\max_\pi P(\pi \succ o) - \beta KL(\pi | ref) - (\beta/\eta) KL(\pi | c)`, which is
    ``log pi = eta / (beta (1 + eta)) P o + eta / (1 + eta) log ref + 1 / (1 + eta) log c + const``.

    Args:
        pref: preference probabilities, ``(..., n, n)``, with ``pref + pref.mT == 1``.
        log_center: log-probabilities of the centre ``c``, ``(..., n)``.
        log_opponent: log-probabilities of the opponent ``o``, ``(..., n)``.
        log_ref: log-probabilities of the reference, ``(..., n)``.
        beta: strength of the KL regularisation, positive.
        eta: step size, positive; ``inf`` drops the pull towards the centre.

    Returns:
        normalised log-probabilities, ``(..., n)``.
    """
    stay = 1.0 / (1.0 + eta)
    win = (pref @ log_opponent.exp().unsqueeze(-1)).squeeze(-1)
    # 0 * -inf never arises: the reference is positive and so is every iterate
    return torch.log_softmax((1.0 - stay) * (win / beta + log_ref) + stay * log_center, dim=-1)


def solve_preference_game(
    pref: Tensor,
    log_ref: Tensor,
    beta: float,
    *,
    eta: float | None = None,
    num_iterations: int = 200,
    num_inner: int | None = 2,
    return_trajectory: bool = False,
) -> Tensor:
    """Iterate ``pi <- inner steps h <- Prox(pi, h)`` from the reference.

    One family by the number of inner steps: 1 is mirror descent (regularised self-play), 2 is Nash-MP, and ``None``
    solves the inner problem exactly, which is Nash Prox. With ``num_inner=2`` and ``eta <= 2 beta``,
    ``KL(pi* | pi_K) <= (1 + eta)^-K KL(pi* | ref)``: two preference queries per iteration, so ``(1 + 2 beta)^(-N/2)``
    for ``N`` queries. The exact version contracts at least that fast for every ``eta``.

    Args:
        pref: preference probabilities, ``(..., n, n)``.
        log_ref: log-probabilities of the reference, ``(..., n)``, finite.
        beta: strength of the KL regularisation, positive.
        eta: step size, positive; default ``2 * beta``, the largest with a guarantee for Nash-MP.
        num_iterations: outer iterations ``K``.
        num_inner: prox steps per iteration, or ``None`` for the exact proximal point.
        return_trajectory: return all iterates instead of the last.

    Returns:
        log-probabilities ``(..., n)``, or ``(num_iterations + 1, ..., n)`` with the start in front.

    Raises:
        ValueError: if an argument is outside its range or ``pref`` is no preference matrix.
    """
    pref, log_ref = _check_game(pref, log_ref, beta)
    eta = 2.0 * beta if eta is None else eta
    _check_positive("eta", eta)
    if num_iterations < 0:
        raise ValueError(f"num_iterations={num_iterations} must be 0 or more")
    if num_inner is not None and num_inner < 1:
        raise ValueError(f"num_inner={num_inner} must be 1 or more, or None for the exact proximal point")
    if num_inner is not None and num_inner > 1 and eta > 2.0 * beta * (1 + 1e-9):
        warnings.warn(
            f"eta={eta} is above 2 * beta = {2 * beta}: prox steps with num_inner={num_inner} may cycle; "
            "use eta <= 2 * beta, or num_inner=None",
            stacklevel=2,
        )
    log_pi = log_ref
    trajectory = [log_pi]
    for _ in range(num_iterations):
        log_pi = preference_iteration(pref, log_pi, log_ref, beta, eta, num_inner)
        trajectory.append(log_pi)
    return torch.stack(trajectory) if return_trajectory else log_pi


def preference_iteration(
    pref: Tensor, log_pi: Tensor, log_ref: Tensor, beta: float, eta: float, num_inner: int | None
) -> Tensor:
    """One outer iteration of :func:`solve_preference_game`, without checks."""
    if num_inner is None:
        # pi = Prox(pi_k, pi) is the equilibrium of a game with a stronger regulariser and a mixed reference
        stay = 1.0 / (1.0 + eta)
        mixed = torch.log_softmax((1.0 - stay) * log_ref + stay * log_pi, dim=-1)
        return regularized_nash(pref, mixed, beta / (1.0 - stay))
    opponent = log_pi
    for _ in range(num_inner):
        opponent = prox_step(pref, log_pi, opponent, log_ref, beta, eta)
    return opponent


def nash_md(
    pref: Tensor,
    log_ref: Tensor,
    beta: float,
    *,
    eta: float,
    num_iterations: int = 200,
    return_trajectory: bool = False,
) -> Tensor:
    """Nash-MD, the baseline: mirror descent against a geometric mixture of policy and reference.

    ``mu ~ pi^(1 - eta beta) ref^(eta beta)``, then ``pi ~ mu exp(eta P mu)``. For a constant ``eta`` it converges to
    a point that is off the equilibrium by ``O(eta)``.

    Args:
        pref: preference probabilities, ``(..., n, n)``.
        log_ref: log-probabilities of the reference, ``(..., n)``, finite.
        beta: strength of the KL regularisation, positive.
        eta: step size in ``(0, 1 / beta]``.
        num_iterations: preference queries.
        return_trajectory: return all iterates instead of the last.

    Returns:
        log-probabilities ``(..., n)``, or ``(num_iterations + 1, ..., n)`` with the start in front.
    """
    pref, log_ref = _check_game(pref, log_ref, beta)
    if not 0.0 < eta * beta <= 1.0:
        raise ValueError(f"eta={eta} must be in (0, 1 / beta] = (0, {1 / beta}]")
    log_pi = log_ref
    trajectory = [log_pi]
    for _ in range(num_iterations):
        log_pi = nash_md_iteration(pref, log_pi, log_ref, beta, eta)
        trajectory.append(log_pi)
    return torch.stack(trajectory) if return_trajectory else log_pi


def nash_md_iteration(pref: Tensor, log_pi: Tensor, log_ref: Tensor, beta: float, eta: float) -> Tensor:
    """One iteration of :func:`nash_md`, without checks."""
    mixed = torch.log_softmax((1.0 - eta * beta) * log_pi + eta * beta * log_ref, dim=-1)
    win = (pref @ mixed.exp().unsqueeze(-1)).squeeze(-1)
    return torch.log_softmax(mixed + eta * win, dim=-1)


def regularized_nash(
    pref: Tensor, log_ref: Tensor, beta: float, *, tol: float = 1e-12, max_iterations: int = 200
) -> Tensor:
    """The equilibrium to machine precision by a damped Newton method; the reference for tests and figures.

    Solves ``l - log ref - (P - 1/2) e^l / beta = const``, ``sum e^l = 1`` for the log-probabilities ``l`` in float64,
    with backtracking, on ``(n + 1) x (n + 1)`` systems: meant for up to a few thousand actions.

    Args:
        pref: preference probabilities, ``(..., n, n)``.
        log_ref: log-probabilities of the reference, ``(..., n)``, finite.
        beta: strength of the KL regularisation, positive.
        tol: largest residual, in units of log-probability.
        max_iterations: Newton steps per strength of the regularisation before giving up.

    Returns:
        log-probabilities ``(..., n)`` in the dtype of ``log_ref``.

    Raises:
        RuntimeError: if the residual is still above ``tol``.
    """
    pref, log_ref = _check_game(pref, log_ref, beta)
    start = log_ref.double().expand(*torch.broadcast_shapes(pref.shape[:-2], log_ref.shape[:-1]), -1)
    payoff, log_pi = pref.double() - 0.5, start
    # Newton starts close: equilibria of less and less regularised games lead to the wanted one
    for halving in range(max(0, math.ceil(math.log2(0.5 / beta))), -1, -1):
        target = tol if halving == 0 else 1e-3
        log_pi, error = _newton(payoff, start, log_pi, beta * 2.0**halving, target, max_iterations)
    if error > max(tol, 1e-15 * log_ref.shape[-1] / min(1.0, beta)):
        raise RuntimeError(f"regularized_nash stopped at residual {error:.1e} > tol={tol:.1e}; raise max_iterations")
    return log_pi.to(log_ref.dtype)


def _newton(
    payoff: Tensor, log_ref: Tensor, log_pi: Tensor, beta: float, tol: float, max_iterations: int
) -> tuple[Tensor, float]:
    """Damped Newton from ``log_pi``; returns the solution and the largest residual in units of log-probability."""
    n = log_ref.shape[-1]
    eye = torch.eye(n, dtype=log_ref.dtype, device=log_ref.device)

    def residual(log_pi: Tensor) -> Tensor:
        gap = log_pi - log_ref - (payoff @ log_pi.exp().unsqueeze(-1)).squeeze(-1) / beta
        return gap - (log_pi.exp() * gap).sum(-1, keepdim=True)

    value = residual(log_pi)
    for _ in range(max_iterations):
        size = value.abs().amax(-1, keepdim=True)
        if size.max() <= tol:
            break
        pi = log_pi.exp()
        # unknowns: the change of log pi, and the constant that absorbs the normalisation
        system = log_pi.new_zeros(*log_pi.shape[:-1], n + 1, n + 1)
        system[..., :n, :n] = eye - payoff * pi.unsqueeze(-2) / beta
        system[..., :n, n] = 1.0
        system[..., n, :n] = pi
        right = torch.cat([-value, torch.zeros_like(size)], dim=-1).unsqueeze(-1)
        direction = torch.linalg.solve(system, right).squeeze(-1)[..., :n]
        scale = torch.ones_like(size)
        for _ in range(40):
            candidate = torch.log_softmax(log_pi + scale * direction, dim=-1)
            candidate_value = residual(candidate)
            better = candidate_value.abs().amax(-1, keepdim=True) < size
            if better.all():
                break
            scale = torch.where(better, scale, scale / 2)
        if not better.any():  # at rounding level
            break
        log_pi = torch.where(better, candidate, log_pi)
        value = torch.where(better, candidate_value, value)
    return log_pi, value.abs().max().item()


def exploitability(pref: Tensor, log_pi: Tensor, log_ref: Tensor, beta: float) -> Tensor:
    """What a best answer gains over the value 1/2: ``max_pi' P_beta(pi' > pi) - 1/2``, zero only at the equilibrium.

    Args:
        pref: preference probabilities, ``(..., n, n)``.
        log_pi: log-probabilities of the policy, ``(..., n)``.
        log_ref: log-probabilities of the reference, ``(..., n)``.
        beta: strength of the KL regularisation, positive.

    Returns:
        one number per game, ``(...)``; rounding may leave it at ``-1e-16``.
    """
    # the centred game has the same gap and keeps its digits near the equilibrium
    win = ((pref - 0.5) @ log_pi.exp().unsqueeze(-1)).squeeze(-1)
    best = beta * torch.logsumexp(log_ref + win / beta, dim=-1)
    return best + beta * (log_pi.exp() * (log_pi - log_ref)).sum(-1)


def _check_game(pref: Tensor, log_ref: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Validate a game; returns it with ``log_ref`` normalised."""
    _check_positive("beta", beta)
    if math.isinf(beta):
        raise ValueError("beta=inf must be finite: the equilibrium is then the reference itself")
    if pref.ndim < 2 or pref.shape[-1] != pref.shape[-2]:
        raise ValueError(f"pref has shape {tuple(pref.shape)} but must be square in its last two dimensions")
    if not pref.is_floating_point() or not log_ref.is_floating_point():
        raise ValueError("pref and log_ref must be floating point tensors")
    if log_ref.shape[-1] != pref.shape[-1]:
        raise ValueError(f"log_ref has {log_ref.shape[-1]} actions but pref has {pref.shape[-1]}")
    if not torch.isfinite(log_ref).all():
        raise ValueError("log_ref must be finite: give every action a positive reference probability or leave it out")
    if not ((pref >= 0) & (pref <= 1)).all():
        raise ValueError("pref must hold probabilities in [0, 1]")
    gap = (pref + pref.mT - 1.0).abs().amax().item()
    if gap > 1e-6:
        raise ValueError(f"pref + pref.mT must be 1 everywhere, but is off by {gap:.1e}; use (P + 1 - P.mT) / 2")
    return pref, torch.log_softmax(log_ref, dim=-1)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}={value} must be positive")
