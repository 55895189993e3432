"""Small-gain Nash: from bounds on curvature and coupling to weights, a contraction rate and safe steps.

Vedansh Sharma, *Small-Gain Nash: Certified Contraction to Nash Equilibria in Differentiable Games*, arXiv 2512.06791.
Player i minimises its own loss over its own block; F stacks the players' own gradients, J is its Jacobian with blocks
``J_ij``. ``mu_i`` bounds the least curvature of ``J_ii`` from below, ``L_ij`` the spectral norm of ``J_ij`` from above.
The constants are those of the author's code; the closed form of the weights for any number of players and the certified
Runge-Kutta step are derived in the docstrings, and tested.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from scipy.optimize import brentq, minimize, minimize_scalar
from torch import Tensor

RK4_STABILITY = 2.5  # the paper's guideline: h <= 2.5 / beta


@dataclass(frozen=True)
class GameBounds:
    """Bounds on a region.

    Attributes:
        mu: least own curvatures ``(N,)``, float64; of any sign.
        coupling: largest norms of the coupling blocks ``(N, N)``, float64, >= 0 with a zero diagonal.
        exact: whether they are bounds. Those from sampled points or power iterations are estimates.
    """

    mu: Tensor
    coupling: Tensor
    exact: bool


def check_bounds(mu: Tensor, coupling: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds in float64.

    Raises:
        ValueError: fewer than two players, wrong shapes, values that are not finite, negative or own couplings.
    """
    mu = torch.as_tensor(mu, dtype=torch.float64).cpu()
    coupling = torch.as_tensor(coupling, dtype=torch.float64).cpu()
    if mu.ndim != 1 or len(mu) < 2:
        raise ValueError(f"mu must have one entry for each of 2 or more players, got shape {tuple(mu.shape)}")
    if coupling.shape != (len(mu), len(mu)):
        raise ValueError(f"coupling must be a {len(mu)} x {len(mu)} matrix, got shape {tuple(coupling.shape)}")
    if not mu.isfinite().all():
        raise ValueError(f"mu must be finite, got {mu.tolist()}")
    if not coupling.isfinite().all() or bool((coupling < 0).any()):
        raise ValueError(f"coupling must be >= 0 and finite, got {coupling.tolist()}")
    if bool(coupling.diagonal().any()):
        raise ValueError(f"coupling must have a zero diagonal, got {coupling.diagonal().tolist()}")
    return mu, coupling


def _check_weights(weights: Tensor, number: int) -> Tensor:
    weights = torch.as_tensor(weights, dtype=torch.float64).cpu()
    if weights.shape != (number,):
        raise ValueError(f"weights must have {number} entries, got shape {tuple(weights.shape)}")
    if not weights.isfinite().all() or bool((weights <= 0).any()):
        raise ValueError(f"weights must be > 0 and finite, got {weights.tolist()}")
    return weights


def small_gain_matrix(mu: Tensor, coupling: Tensor, weights: Tensor, margin: float = 0.0) -> Tensor:
    """``C`` with ``C_ii = 2 w_i (mu_i - margin)`` and ``C_ij = -(w_i L_ij + w_j L_ji)``.

    The game contracts at the rate ``margin`` in the norm ``sum_i w_i |x_i|^2`` where it is positive semidefinite.

    Args:
        mu: ``(N,)``.
        coupling: ``(N, N)``.
        weights: ``(N,)``, > 0.
        margin: the rate.
    """
    mu, coupling = check_bounds(mu, coupling)
    weights = _check_weights(weights, len(mu))
    scaled = weights[:, None] * coupling
    return torch.diag(2 * weights * (mu - margin)) - scaled - scaled.T


def small_gain_margin(mu: Tensor, coupling: Tensor, weights: Tensor) -> Tensor:
    """The largest rate that the bounds certify with these weights, a scalar of either sign; differentiable.

    The least eigenvalue of ``S``, ``S_ii = mu_i``, ``S_ij = -(sqrt(w_i / w_j) L_ij + sqrt(w_j / w_i) L_ji) / 2``: the
    small-gain matrix scaled by the weights, which does not change with their scale.
    """
    root = weights.sqrt()
    scaled = root[:, None] * coupling / root
    return torch.linalg.eigvalsh(torch.diag(mu) - (scaled + scaled.T) / 2)[0]


def optimal_weights(
    mu: Tensor,
    coupling: Tensor,
    objective: str = "margin",
    lipschitz: Callable[[Tensor], float] | None = None,
) -> tuple[Tensor, float]:
    """Weights with the best certificate, the first of them 1, and the margin that they certify.

    ``"margin"`` is in closed form: the best margin is the left-most eigenvalue of ``diag(mu) - L``, attained at
    ``w_i = u_i / v_i`` for the left and right Perron vectors ``u``, ``v`` of ``max(mu) I - diag(mu) + L``. Where a
    player is not reached by the others these have zeros, and the optimum is a limit: couplings are then raised to 1e-6
    of the largest number to find weights, and the margin is that of the given couplings.

    Args:
        mu: ``(N,)``.
        coupling: ``(N, N)``.
        objective: ``"margin"``; ``"euler"``, the largest margin / beta^2, or ``"rk4"``, the largest margin / beta.
        lipschitz: beta as a function of the weights; needed by the last two.

    Raises:
        ValueError: bad bounds, or an unknown objective.
    """
    mu, coupling = check_bounds(mu, coupling)
    if objective not in ("margin", "euler", "rk4"):
        raise ValueError(f"objective must be one of 'margin', 'euler', 'rk4', got {objective!r}")
    weights = _perron_weights(mu, coupling)
    if objective != "margin":
        if lipschitz is None:
            raise ValueError(f"lipschitz must be given with objective={objective!r}, got None")
        weights = _searched_weights(mu, coupling, weights, 2 if objective == "euler" else 1, lipschitz)
    return weights, float(small_gain_margin(mu, coupling, weights))


def is_reducible(coupling: Tensor) -> bool:
    """Whether some player is not reached by another's actions, directly or through others."""
    steps = (coupling > 0).double() + torch.eye(len(coupling), dtype=torch.float64)
    return bool((torch.linalg.matrix_power(steps, len(coupling)) == 0).any())


def _perron_weights(mu: Tensor, coupling: Tensor) -> Tensor:
    if not coupling.any():
        return torch.ones_like(mu)
    if is_reducible(coupling):
        floor = 1e-6 * max(float(coupling.max()), float(mu.abs().max()))
        coupling = coupling.clamp(min=floor).fill_diagonal_(0.0)
    matrix = torch.diag(mu.max() - mu) + coupling
    right, left = (_perron_vector(m) for m in (matrix, matrix.T))
    weights = left / right
    return weights / weights[0]


def _perron_vector(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eig(matrix)
    return vectors[:, int(values.real.argmax())].real.abs()


def _searched_weights(
    mu: Tensor, coupling: Tensor, start: Tensor, power: int, lipschitz: Callable[[Tensor], float]
) -> Tensor:
    def loss(logs: Any) -> float:
        weights = torch.tensor([1.0, *[math.exp(x) for x in logs]], dtype=torch.float64)
        return -float(small_gain_margin(mu, coupling, weights)) / lipschitz(weights) ** power

    if loss(start[1:].log().tolist()) >= 0:
        return start  # nothing is certified, so there is no step to lengthen
    if len(mu) == 2:
        band = timescale_band(mu, coupling)
        assert band is not None
        low, high = max(band[0], 1e-12 * float(start[1])), min(band[1], 1e12 * float(start[1]))
        found = minimize_scalar(lambda x: loss([x]), bounds=(math.log(low), math.log(high)), method="bounded",
                                options={"xatol": 1e-10}).x  # fmt: skip
        return torch.tensor([1.0, math.exp(found)], dtype=torch.float64)
    logs = minimize(loss, start[1:].log().numpy(), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-14}).x
    return torch.tensor([1.0, *[math.exp(x) for x in logs]], dtype=torch.float64)


def timescale_band(mu: Tensor, coupling: Tensor, margin: float = 0.0) -> tuple[float, float] | None:
    """All ratios ``w_2 / w_1`` of two players that certify ``margin``: an interval, or None if there is none.

    With ``P = (mu_1 - margin) (mu_2 - margin)`` and ``l = L_12 L_21`` it is
    ``((sqrt P -+ sqrt(P - l)) / L_21)^2``; where a coupling is zero, the limit.

    Raises:
        ValueError: bad bounds, or not two players.
    """
    mu, coupling = check_bounds(mu, coupling)
    if len(mu) != 2:
        raise ValueError(f"mu must have 2 entries, got {len(mu)}; see weight_bands for more players")
    first, second = (float(x) - margin for x in mu)
    there, back = float(coupling[0, 1]), float(coupling[1, 0])
    if first <= 0 or second <= 0 or first * second <= there * back:
        return None
    product = first * second
    root = math.sqrt(product) + math.sqrt(product - there * back)
    # (sqrt P - sqrt(P - l)) / L_21 = L_12 / (sqrt P + sqrt(P - l)), which does not cancel
    return (there / root) ** 2, (root / back) ** 2 if back else math.inf


def weight_bands(
    mu: Tensor, coupling: Tensor, weights: Tensor, margin: float = 0.0
) -> list[tuple[float, float]] | None:
    """For each player the interval of its weight, the others fixed, that certifies ``margin``; None if there is none.

    By bisection: the margin rises and then falls in the logarithm of a weight. Ends beyond 1e12 times the weight are
    returned as 0 and infinity.
    """
    mu, coupling = check_bounds(mu, coupling)
    weights = _check_weights(weights, len(mu))

    def excess(player: int, log_factor: float) -> float:
        moved = weights.clone()
        moved[player] *= math.exp(log_factor)
        return float(small_gain_margin(mu, coupling, moved)) - margin

    if excess(0, 0.0) < 0:
        return None
    far = math.log(1e12)
    bands = []
    for player, weight in enumerate(weights.tolist()):
        low, high = (
            None if excess(player, end) >= 0 else weight * math.exp(brentq(lambda t, i=player: excess(i, t), 0.0, end))
            for end in (-far, far)
        )
        bands.append((0.0 if low is None else low, math.inf if high is None else high))
    return bands


def euler_factor(margin: float, lipschitz: float, step: float) -> float:
    """Bound on what one Euler step leaves of a distance: ``sqrt(1 - 2 h a + h^2 b^2)``."""
    return math.sqrt(max(0.0, 1 - 2 * step * margin + (step * lipschitz) ** 2))


def certified_rk4_step(margin: float, lipschitz: float) -> float:
    """Largest step of the classical Runge-Kutta method that is sure to contract, also where F is not linear.

    The increment of a step is that of an Euler step with an averaged Jacobian, and what is left is bounded by powers
    of ``h beta``: it contracts where ``sqrt(1 - 2 h a + h^2 b^2) + (h b)^2 / 2 + (h b)^3 / 6 + (h b)^4 / 24 < 1``,
    which holds from 0 to one root.
    """
    if not margin > 0:
        return 0.0

    def growth(step: float) -> float:
        z = step * lipschitz
        inner = z * z - 2 * step * margin
        return inner / (1 + math.sqrt(max(0.0, 1 + inner))) + z**2 / 2 + z**3 / 6 + z**4 / 24

    high = margin / lipschitz**2
    while growth(high) <= 0:
        high *= 2
    root: float = brentq(growth, 1e-3 * margin / lipschitz**2, high, xtol=1e-15 * high, rtol=1e-14)
    return root * (1 - 1e-12)


@dataclass(frozen=True)
class SmallGainCertificate:
    """What is known of a game on a region, and the steps that follow.

    Attributes:
        weights: block weights ``(N,)``, the first 1.
        margin: the contraction rate alpha that the bounds give; certified only if > 0.
        lipschitz: beta, the largest ``|M^(1/2) J M^(-1/2)|`` on the region.
        certified: whether the game contracts on the region (an estimate unless ``exact``).
        exact: whether all bounds are bounds rather than estimates from samples.
        euler_step_max: ``2 alpha / beta^2``; shorter steps contract.
        euler_step: ``alpha / beta^2``, the best of them.
        euler_factor: what a step of that length leaves of the distance.
        rk4_step_cfl: the paper's guideline ``2.5 / beta`` for Runge-Kutta: stability of the spectrum, not contraction.
        rk4_step_certified: the longest Runge-Kutta step that is sure to contract.
        timescale_band: for two players the ratios ``w_2 / w_1`` with a margin > 0.
        trust_radius: a start within this M-norm of the centre stays in the region.
        euclidean_margin: the rate in the plain norm, without weights; often negative where ``margin`` is not.
        true_margin: the rate with the weights from the Jacobian itself, >= ``margin`` at the sampled points.
        bounds: curvatures and couplings.
        frozen_metric: whether the metric's own change was left out (Fisher geometry).
        hint: why nothing is certified, or what to know of the result.
    """

    weights: Tensor
    margin: float
    lipschitz: float
    certified: bool
    exact: bool
    euler_step_max: float
    euler_step: float
    euler_factor: float
    rk4_step_cfl: float
    rk4_step_certified: float
    timescale_band: tuple[float, float] | None
    trust_radius: float
    euclidean_margin: float
    true_margin: float
    bounds: GameBounds
    frozen_metric: bool = False
    hint: str = ""

    @classmethod
    def from_margins(
        cls, bounds: GameBounds, weights: Tensor, lipschitz: float, radius: float, certified: bool, **more: Any
    ) -> Self:
        """Fill in what follows from the bounds, the weights and beta."""
        margin = float(small_gain_margin(bounds.mu, bounds.coupling, weights))
        certified = certified and margin > 0 and lipschitz > 0
        safe = max(margin, 0.0) if certified else 0.0
        best = safe / lipschitz**2 if lipschitz else 0.0
        return cls(
            weights=weights,
            margin=margin,
            lipschitz=lipschitz,
            certified=certified,
            exact=bounds.exact,
            euler_step_max=2 * best,
            euler_step=best,
            euler_factor=euler_factor(safe, lipschitz, best),
            rk4_step_cfl=RK4_STABILITY / lipschitz if certified else 0.0,
            rk4_step_certified=certified_rk4_step(safe, lipschitz) if certified else 0.0,
            timescale_band=timescale_band(bounds.mu, bounds.coupling) if len(bounds.mu) == 2 else None,
            trust_radius=radius * math.sqrt(float(weights.min())),
            bounds=bounds,
            **more,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; an infinite end of the band is the text ``"inf"``."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "bounds"}
        plain["weights"] = self.weights.tolist()
        if self.timescale_band is not None:
            plain["timescale_band"] = ["inf" if math.isinf(end) else end for end in self.timescale_band]
        bounds = {"mu": self.bounds.mu.tolist(), "coupling": self.bounds.coupling.tolist(), "exact": self.bounds.exact}
        return plain | {"bounds": bounds}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        """The certificate that :meth:`to_dict` wrote."""
        given = dict(plain)
        bounds = given.pop("bounds")
        mu, coupling = (torch.tensor(bounds[name], dtype=torch.float64) for name in ("mu", "coupling"))
        given["weights"] = torch.tensor(given["weights"], dtype=torch.float64)
        if given["timescale_band"] is not None:
            low, high = (float(end) for end in given["timescale_band"])
            given["timescale_band"] = (low, high)
        return cls(bounds=GameBounds(mu, coupling, bounds["exact"]), **given)
