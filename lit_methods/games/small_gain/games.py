"""Games as functions of the players' blocks, and the pseudo-gradient."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.utils import parameters_to_vector


@runtime_checkable
class DifferentiableGame(Protocol):
    """Anything with losses of the players' blocks."""

    def losses(self, *blocks: Tensor) -> Sequence[Tensor]:
        """What each player minimises, scalars.

        Args:
            blocks: one vector ``(d_i,)`` for each player.
        """


def pseudo_gradient(game: DifferentiableGame, blocks: Sequence[Tensor]) -> list[Tensor]:
    """Each player's gradient of its own loss by its own block, by :func:`torch.func.grad`."""

    def own_loss(player: int) -> Callable[[Tensor], Tensor]:
        return lambda block: game.losses(*blocks[:player], block, *blocks[player + 1 :])[player]

    return [grad(own_loss(player))(block) for player, block in enumerate(blocks)]


class QuadraticGame(nn.Module):
    """``f_i(x) = x_i' Q_i x_i / 2 + sum_j x_i' A_ij x_j``. Its pseudo-gradient is linear: certificates are exact.

    Args:
        own: symmetric matrices ``Q_i``, ``(d_i, d_i)``.
        coupling: ``coupling[i][j]`` is ``A_ij``, ``(d_i, d_j)``; None for none, as on the diagonal.

    Raises:
        ValueError: fewer than two players, or shapes that do not fit.
    """

    affine = True

    def __init__(self, own: Sequence[Sequence[Sequence[float]]], coupling: Sequence[Sequence[object]]) -> None:
        super().__init__()
        matrices = [torch.as_tensor(q, dtype=torch.float64) for q in own]
        if len(matrices) < 2:
            raise ValueError(f"own must have a matrix for each of 2 or more players, got {len(matrices)}")
        sizes = [len(q) for q in matrices]
        for i, q in enumerate(matrices):
            if q.shape != (sizes[i], sizes[i]) or not torch.allclose(q, q.T):
                raise ValueError(f"own[{i}] must be a symmetric matrix, got shape {tuple(q.shape)}")
            self.register_buffer(f"own_{i}", q, persistent=False)
        if [len(row) for row in coupling] != [len(sizes)] * len(sizes):
            raise ValueError(f"coupling must be {len(sizes)} rows of {len(sizes)} entries")
        for i, row in enumerate(coupling):
            for j, a in enumerate(row):
                given = torch.zeros(sizes[i], sizes[j]) if a is None else a
                matrix = torch.as_tensor(given, dtype=torch.float64)
                if matrix.shape != (sizes[i], sizes[j]) or (i == j and bool(matrix.any())):
                    raise ValueError(
                        f"coupling[{i}][{j}] must be "
                        + ("None" if i == j else f"of shape {(sizes[i], sizes[j])}, got {tuple(matrix.shape)}")
                    )
                self.register_buffer(f"coupling_{i}_{j}", matrix, persistent=False)
        self.sizes = sizes

    @classmethod
    def toy(cls, mu: float = 1.0, a: float = 10.0, b: float = 0.05) -> "QuadraticGame":
        """Two numbers: ``mu x1^2 / 2 + a x1 x2`` and ``mu x2^2 / 2 + b x1 x2``, the paper's first example."""
        return cls([[[mu]], [[mu]]], [[None, [[a]]], [[[b]], None]])

    @classmethod
    def rotated(
        cls, size: int = 32, strength: float = 1.0, mu: float = 1.0, a: float = 10.0, b: float = 0.05, seed: int = 12345
    ) -> "QuadraticGame":
        """The paper's quadratic game: curvatures ``mu I``, couplings ``strength a R`` and ``strength b R'``.

        Args:
            size: coordinates of each player, >= 1.
            strength: lambda, which scales both couplings.
            mu: own curvature.
            a: the first player's coupling.
            b: the second player's.
            seed: of the orthogonal matrix R.
        """
        generator = torch.Generator().manual_seed(seed)
        q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
        rotation = q * r.diagonal().sign()
        own = mu * torch.eye(size, dtype=torch.float64)
        return cls([own, own], [[None, strength * a * rotation], [strength * b * rotation.T, None]])  # type: ignore[list-item]

    def losses(self, *blocks: Tensor) -> list[Tensor]:
        """Each player's loss."""
        found = []
        for i, x in enumerate(blocks):
            others = sum(self.get_buffer(f"coupling_{i}_{j}").to(y) @ y for j, y in enumerate(blocks) if j != i)
            found.append(x @ (self.get_buffer(f"own_{i}").to(x) @ x) / 2 + x @ others)
        return found


class NetworkGame:
    """A game of networks: each player's block is all parameters of its module, in one vector.

    Args:
        losses: computes the players' losses from the modules as they are; deterministic, and twice differentiable for
            certificates.
        players: one module for each player.

    Raises:
        ValueError: fewer than two players.
    """

    def __init__(self, losses: Callable[[], Sequence[Tensor]], players: Sequence[nn.Module]) -> None:
        if len(players) < 2:
            raise ValueError(f"players must be 2 or more modules, got {len(players)}")
        self._call = _Call(losses, players)

    def blocks(self) -> list[Tensor]:
        """The present parameters, as vectors in float64."""
        return [parameters_to_vector(player.parameters()).detach().double() for player in self._call.players]

    def losses(self, *blocks: Tensor) -> Sequence[Tensor]:
        """The losses with these parameters in the place of the modules' own."""
        values: dict[str, Tensor] = {}
        for i, (player, block) in enumerate(zip(self._call.players, blocks, strict=True)):
            named = dict(player.named_parameters())
            parts = block.split([p.numel() for p in named.values()])
            for (name, p), part in zip(named.items(), parts, strict=True):
                values[f"players.{i}.{name}"] = part.view(p.shape)
        return functional_call(self._call, values, ())


class _Call(nn.Module):
    """Holds the modules while ``functional_call`` exchanges their parameters."""

    def __init__(self, losses: Callable[[], Sequence[Tensor]], players: Sequence[nn.Module]) -> None:
        super().__init__()
        self.players = nn.ModuleList(players)
        self._losses = losses

    def forward(self) -> Sequence[Tensor]:
        return self._losses()
