"""Bounds of a differentiable game on a region, and the certificate that they give."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import jacrev, jvp, vjp, vmap
from torch.quasirandom import SobolEngine

from lit_methods.games.small_gain.certificate import GameBounds, SmallGainCertificate, is_reducible, optimal_weights
from lit_methods.games.small_gain.games import DifferentiableGame, pseudo_gradient
from lit_methods.optim.foundation.ranks import rank, world_size

Metric = Callable[..., Sequence[Tensor]]

_DENSE_SIZE = 512  # larger blocks get Lanczos in estimate_bounds(method="matrix_free")
_PAIRS = 64


def sample_points(
    center: Sequence[Tensor], radius: float, sampling: str = "vertices", num_points: int = 256, seed: int = 0
) -> list[Tensor]:
    """Points of the box ``|x - center| <= radius``, the centre first; one ``(points, d_i)`` for each player.

    Args:
        center: blocks ``(d_i,)``.
        radius: half the side, > 0.
        sampling: ``"vertices"``: all 2^d corners for d <= 12 coordinates, else Sobol points; ``"sobol"``;
            ``"uniform"``.
        num_points: how many Sobol or uniform points; a quarter as many interior points join the corners.
        seed: of Sobol's scrambling and of the uniform points.

    Raises:
        ValueError: an argument out of range.
    """
    if not 0 < radius < float("inf"):
        raise ValueError(f"radius must be > 0 and finite, got {radius}")
    if num_points < 1:
        raise ValueError(f"num_points must be >= 1, got {num_points}")
    if sampling not in ("vertices", "sobol", "uniform"):
        raise ValueError(f"sampling must be one of 'vertices', 'sobol', 'uniform', got {sampling!r}")
    flat = torch.cat([block.detach().double().flatten() for block in center])
    generator = torch.Generator().manual_seed(seed)

    def uniform(number: int) -> Tensor:
        return 2 * torch.rand(number, len(flat), dtype=torch.float64, generator=generator) - 1

    if sampling == "vertices" and len(flat) <= 12:
        corners = 2.0 * ((torch.arange(2 ** len(flat))[:, None] >> torch.arange(len(flat))) & 1).double() - 1
        offsets = torch.cat([corners, uniform(max(1, num_points // 4))])
    elif sampling == "uniform" or len(flat) > SobolEngine.MAXDIM:
        offsets = uniform(num_points)
    else:
        offsets = 2 * SobolEngine(len(flat), scramble=True, seed=seed).draw(num_points, dtype=torch.float64) - 1
    points = torch.cat([flat[None], flat + radius * offsets.to(flat)])
    return list(points.split([block.numel() for block in center], 1))


def estimate_bounds(
    game: DifferentiableGame,
    points: Sequence[Tensor],
    *,
    metric: Metric | None = None,
    method: str = "dense",
    inflation: float = 0.0,
    chunk_size: int | None = None,
) -> GameBounds:
    """Least own curvatures and largest couplings over points.

    They are bounds on a region only where the Jacobian is constant (games with a true attribute ``affine``), else
    estimates. Ranks share the points out and return the same.

    Args:
        game: losses of the blocks.
        points: one ``(points, d_i)`` for each player.
        metric: gives, for the blocks of one point, each player's matrix ``W_i`` ``(d_i, k_i)`` of the metric, so that
            blocks are measured as ``W_i' J_ij W_j``; None for the Euclidean one.
        method: ``"dense"`` forms the Jacobian, ``(d, d)`` a point; ``"matrix_free"`` takes products with it only:
            Lanczos and power iterations, with their residuals, so that curvatures come out lower, couplings higher.
        inflation: share by which couplings are raised, and curvatures lowered by the same share of their size, >= 0.
        chunk_size: points at a time; None for all. With 1 no ``vmap`` over points is used, so that losses may depend
            on values.

    Raises:
        ValueError: an argument out of range; derivatives that are not finite, by player and number of points.
    """
    if method not in ("dense", "matrix_free"):
        raise ValueError(f"method must be 'dense' or 'matrix_free', got {method!r}")
    if not 0 <= inflation < float("inf"):
        raise ValueError(f"inflation must be >= 0 and finite, got {inflation}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1 or None, got {chunk_size}")
    if method == "matrix_free" and metric is not None:
        raise ValueError("metric must be None with method='matrix_free'")
    blocks = [block.double() for block in points]
    jacobians: Iterable[list[list[Tensor]]]
    if method == "dense":
        jacobians = [_jacobian_blocks(game, blocks, metric, chunk_size)]
        extremes = [_extremes(found) for found in jacobians]
    else:
        shares = range(rank(), len(blocks[0]), world_size())
        extremes = [_matrix_free_extremes(game, [block[i] for block in blocks]) for i in shares]
    number = len(blocks)
    mu = torch.full((number,), float("inf"), dtype=torch.float64)
    coupling = torch.zeros(number, number, dtype=torch.float64)
    for low, high in extremes:
        mu, coupling = torch.minimum(mu, low), torch.maximum(coupling, high)
    mu, coupling = _over_ranks(mu, dist.ReduceOp.MIN), _over_ranks(coupling, dist.ReduceOp.MAX)
    exact = bool(getattr(game, "affine", False)) and method == "dense" and metric is None
    return GameBounds(mu - inflation * mu.abs(), (1 + inflation) * coupling, exact)


def certify(
    game: DifferentiableGame,
    center: Sequence[Tensor],
    radius: float = 0.1,
    *,
    sampling: str = "vertices",
    num_points: int = 256,
    objective: str = "margin",
    weights: Tensor | None = None,
    metric: Metric | None = None,
    inflation: float = 0.0,
    chunk_size: int | None = None,
    seed: int = 0,
) -> SmallGainCertificate:
    """Certify that a game contracts on the box around a point, and give weights and steps.

    Sampled bounds are estimates and say so (``exact=False``); as a guard against losses whose second derivatives do not
    tell all (kinks), contraction is also tried on pairs of the points.

    Args:
        game: losses of the blocks; deterministic, twice differentiable.
        center: blocks ``(d_i,)``, best the equilibrium.
        radius: half the side of the box, > 0.
        sampling: ``"vertices"``, ``"sobol"`` or ``"uniform"``: see :func:`sample_points`.
        num_points: how many Sobol or uniform points.
        objective: ``"margin"``, ``"euler"`` or ``"rk4"``: see :func:`optimal_weights`.
        weights: to use instead of the best ones, ``(N,)``.
        metric: Fisher or other metrics: see :func:`estimate_bounds`. Its change over the region is left out
            (``frozen_metric``).
        inflation: margin of safety for sampled bounds: see :func:`estimate_bounds`.
        chunk_size: points at a time; None for all, 1 for losses that ``vmap`` cannot take.
        seed: of the sampled points.

    Raises:
        ValueError: an argument out of range; losses that differ between two evaluations at the centre; derivatives that
            are not finite.
    """
    center = [block.detach().double().flatten() for block in center]
    _check_deterministic(game, center)
    points = sample_points(center, radius, sampling, num_points, seed)
    jacobians = _jacobian_blocks(game, points, metric, chunk_size)
    low, high = _extremes(jacobians)
    mu, coupling = _over_ranks(low, dist.ReduceOp.MIN), _over_ranks(high, dist.ReduceOp.MAX)
    exact = bool(getattr(game, "affine", False)) and metric is None
    bounds = GameBounds(mu - inflation * mu.abs(), (1 + inflation) * coupling, exact)

    def lipschitz(at: Tensor) -> float:
        whole = _weighted(jacobians, at)
        norm = torch.linalg.matrix_norm(whole, 2).max() if len(whole) else torch.zeros((), dtype=torch.float64)
        return (1 + inflation) * float(_over_ranks(norm, dist.ReduceOp.MAX))

    def true_margin(at: Tensor) -> float:
        whole = _weighted(jacobians, at)
        least = torch.linalg.eigvalsh((whole + whole.mT) / 2)[..., 0].min() if len(whole) else torch.tensor(torch.inf)
        return float(_over_ranks(least.double(), dist.ReduceOp.MIN))

    if weights is None:
        weights, margin = optimal_weights(bounds.mu, bounds.coupling, objective, lipschitz)
    else:
        weights = torch.as_tensor(weights, dtype=torch.float64)
        margin = true_margin(weights)
    hints = []
    if bool((bounds.mu <= 0).all()):
        hints.append("no player's loss curves upwards; losses are minimised: negate payoffs")
    if is_reducible(bounds.coupling) and bool(bounds.coupling.any()):
        hints.append("some player is not reached by the others: the best weights are a limit, these are close to it")
    violation = None if metric is not None or margin <= 0 else _violated_pair(game, points, weights, margin)
    if violation is not None:
        hints.append(f"a pair of points contradicts the margin: {violation}; are the losses twice differentiable?")
    return SmallGainCertificate.from_margins(
        bounds, weights, lipschitz(weights), radius, violation is None,
        euclidean_margin=true_margin(torch.ones_like(weights)), true_margin=true_margin(weights),
        frozen_metric=metric is not None, hint="; ".join(hints),
    )  # fmt: skip


def _over_ranks(value: Tensor, operation: Any) -> Tensor:
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value, operation)
    return value


def _check_deterministic(game: DifferentiableGame, center: Sequence[Tensor]) -> None:
    with torch.no_grad():
        first, second = (torch.stack([loss.double() for loss in game.losses(*center)]) for _ in range(2))
    if len(first) != len(center):
        raise ValueError(f"losses must be one for each of {len(center)} players, got {len(first)}")
    if not torch.equal(first, second):
        apart = float((first - second).abs().max())
        raise ValueError(
            f"losses must be deterministic: two evaluations at center differ by {apart:g}; "
            "call .eval() or fix the noise"
        )


def _jacobian_blocks(
    game: DifferentiableGame, points: Sequence[Tensor], metric: Metric | None, chunk_size: int | None
) -> list[list[Tensor]]:
    """``W_i' J_ij W_j`` at this rank's points, ``(points, k_i, k_j)``, as rows of a list."""
    mine = [block[rank() :: world_size()].double() for block in points]
    sizes = [block.shape[1] for block in mine]

    def of_point(*blocks: Tensor) -> tuple[Tensor, ...]:
        flat = torch.cat(blocks)
        jacobian = jacrev(lambda x: torch.cat(pseudo_gradient(game, list(x.split(sizes)))))(flat)
        rows = [row.split(sizes, 1) for row in jacobian.split(sizes, 0)]
        if metric is None:
            return tuple(part for row in rows for part in row)
        factors = metric(*blocks)
        return tuple(factors[i].T @ part @ factors[j] for i, row in enumerate(rows) for j, part in enumerate(row))

    if chunk_size == 1:
        each = [of_point(*(block[i] for block in mine)) for i in range(len(mine[0]))]
        found = [torch.stack(parts) for parts in zip(*each, strict=True)]
    else:
        found = list(vmap(of_point, chunk_size=chunk_size)(*mine))
    number = len(sizes)
    for i in range(number):
        bad = ~torch.cat([x.flatten(1) for x in found[i * number : (i + 1) * number]], 1).isfinite().all(1)
        if bool(bad.any()):
            raise ValueError(
                f"second derivatives of losses[{i}] are not finite at {int(bad.sum())} of {len(bad)} points"
            )
    return [found[i * number : (i + 1) * number] for i in range(number)]


def _extremes(blocks: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Least curvatures ``(N,)`` and largest couplings ``(N, N)`` over the points."""
    number = len(blocks)
    mu = torch.stack([torch.linalg.eigvalsh((row[i] + row[i].mT) / 2)[:, 0].min() for i, row in enumerate(blocks)])
    coupling = torch.zeros(number, number, dtype=torch.float64)
    for i, row in enumerate(blocks):
        for j, part in enumerate(row):
            if i != j:
                coupling[i, j] = torch.linalg.matrix_norm(part, 2).max()
    return mu, coupling


def _weighted(blocks: list[list[Tensor]], weights: Tensor) -> Tensor:
    """``M^(1/2) J M^(-1/2)`` at every point."""
    root = weights.sqrt()
    rows = [torch.cat([root[i] / root[j] * part for j, part in enumerate(row)], 2) for i, row in enumerate(blocks)]
    return torch.cat(rows, 1)


def _violated_pair(game: DifferentiableGame, points: Sequence[Tensor], weights: Tensor, margin: float) -> str | None:
    """The first of some pairs of points that come apart faster than the margin allows."""
    number = len(points[0])
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0))[: 2 * _PAIRS]
    pairs = list(zip(order[::2].tolist(), order[1::2].tolist(), strict=False))
    pairs += [(i, number - 1 - i) for i in range(min(number // 2, _PAIRS))]
    pairs += [(i, i + 1) for i in range(min(number - 1, _PAIRS))]
    gradients: dict[int, list[Tensor]] = {}

    def at(index: int) -> list[Tensor]:
        if index not in gradients:
            gradients[index] = pseudo_gradient(game, [block[index] for block in points])
        return gradients[index]

    for first, second in pairs:
        apart = [block[first] - block[second] for block in points]
        squares = sum(float(w) * float(d @ d) for w, d in zip(weights, apart, strict=True))
        change = [a - b for a, b in zip(at(first), at(second), strict=True)]
        inner = sum(float(w) * float(c @ d) for w, c, d in zip(weights, change, apart, strict=True))
        if squares and inner < (margin - 1e-9) * squares:
            return f"<F(x) - F(y), x - y> = {inner:.4g} where |x - y|^2 = {squares:.4g}"
    return None


def _matrix_free_extremes(game: DifferentiableGame, blocks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Curvatures and couplings at one point from products with the Jacobian alone."""
    number = len(blocks)
    mu = torch.zeros(number, dtype=torch.float64)
    coupling = torch.zeros(number, number, dtype=torch.float64)

    def own_gradient(i: int, j: int) -> Callable[[Tensor], Tensor]:
        """Player i's gradient as a function of block j."""
        return lambda block: pseudo_gradient(game, [*blocks[:j], block, *blocks[j + 1 :]])[i]

    for i in range(number):
        for j in range(number):
            function, block = own_gradient(i, j), blocks[j]
            backward: Any = vjp(function, block)[1]

            def product(v: Tensor, function: Any = function, block: Tensor = block) -> Tensor:
                return jvp(function, (block,), (v,))[1]

            def transposed(u: Tensor, backward: Any = backward) -> Tensor:
                return backward(u)[0]

            if i == j:
                mu[i] = _least_eigenvalue(product, block)
            else:
                coupling[i, j] = _norm(product, transposed, block)
    return mu, coupling


def _least_eigenvalue(product: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """A number at most the least eigenvalue of a symmetric operator: dense when it is small, else Lanczos."""
    size = len(like)
    if size <= _DENSE_SIZE:
        columns = [product(e) for e in torch.eye(size, dtype=torch.float64)]
        matrix = torch.stack(columns, 1)
        return float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0])
    steps = 100
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(size, dtype=torch.float64, generator=generator)
    basis = [v / v.norm()]
    alphas, betas = [], []
    for k in range(steps):
        w = product(basis[k])
        alphas.append(float(basis[k] @ w))
        whole = torch.stack(basis)
        for _ in range(2):  # full orthogonalisation, twice
            w = w - whole.T @ (whole @ w)
        betas.append(float(w.norm()))
        if betas[-1] <= 1e-13 * max(1e-300, abs(alphas[0])):
            break
        basis.append(w / betas[-1])
    small = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    off = torch.tensor(betas[:-1], dtype=torch.float64)
    small += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(small)
    residual = betas[-1] * abs(float(vectors[-1, 0]))
    return float(values[0]) - residual


def _norm(product: Callable[[Tensor], Tensor], transposed: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """A number at least the largest singular value: dense when it is small, else power iterations plus the residual."""
    if len(like) <= _DENSE_SIZE:
        return float(torch.linalg.matrix_norm(torch.stack([product(e) for e in torch.eye(len(like)).double()], 1), 2))
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(like.shape, dtype=torch.float64, generator=generator)
    v /= v.norm()
    square, residual = 0.0, 0.0
    for _ in range(300):
        w = transposed(product(v))
        square = float(v @ w)
        residual = float((w - square * v).norm())
        if not float(w.norm()):
            return 0.0
        v = w / w.norm()
        if residual <= 1e-12 * square:
            break
    return float((square + residual) ** 0.5)


def warn_uncertified(certificate: SmallGainCertificate) -> None:
    """Say once what is missing where nothing is certified."""
    if not certificate.certified:
        warnings.warn(
            f"the game is not certified: margin {certificate.margin:.4g}, mu {certificate.bounds.mu.tolist()}"
            + (f" ({certificate.hint})" if certificate.hint else ""),
            stacklevel=2,
        )
