"""Where every trained parameter is in the coordinates of a particle."""

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from lit_methods.optim.foundation.flat import local_tensor


class ParticleLayout:
    """Translates between vectors of all coordinates and tensors by parameter name; never saved.

    Of DTensors it knows this rank's shards.

    Args:
        groups: the optimizer's ``param_groups``. Parameters without names are called by their position.

    Attributes:
        params: those that require gradients, in the order of their coordinates.
        columns: every group with its slice of the coordinates.
        dtype: of the particles: float64 if any parameter has it, else float32.

    Raises:
        ValueError: no parameter requires gradients.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        every = [p for group in groups for p in group["params"]]
        given = [name for group in groups for name in group.get("param_names", ())]
        names = given or [str(i) for i in range(len(every))]
        self._trained = [p.requires_grad for p in every]
        self._every = every
        self.params = [p for p in every if p.requires_grad]
        if not self.params:
            raise ValueError("params holds nothing to train: no parameter requires gradients")
        self.positions = [i for i, p in enumerate(every) if p.requires_grad]
        self._names = [names[i] for i in self.positions]
        self._shapes = [local_tensor(p).shape for p in self.params]
        self._sizes = [shape.numel() for shape in self._shapes]
        sizes = [sum(local_tensor(p).numel() for p in group["params"] if p.requires_grad) for group in groups]
        bounds = pairwise(accumulate(sizes, initial=0))
        self.columns = [(group, slice(*ends)) for group, ends in zip(groups, bounds, strict=True)]
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for p in self.params) else torch.float32
        self._last: tuple[Tensor, dict[str, Tensor]] | None = None

    def holds(self) -> bool:
        """Whether the same parameters still require gradients."""
        return self._trained == [p.requires_grad for p in self._every]

    def columns_of(self, params: list[Any]) -> Tensor:
        """Indices of the coordinates of some parameters, in their order."""
        starts = dict(zip(map(id, self.params), accumulate(self._sizes, initial=0), strict=False))
        ranges = [torch.arange(local_tensor(p).numel()) + starts[id(p)] for p in params]
        return torch.cat(ranges) if ranges else torch.arange(0)

    def parts(self, *points: Tensor) -> Iterator[tuple[Any, ...]]:
        """Every group with its coordinates of each of ``points`` (..., d)."""
        for group, columns in self.columns:
            yield group, *(points if len(self.columns) == 1 else (x[..., columns] for x in points))

    def current(self) -> Tensor:
        """The parameters' present values, ``(d,)``."""
        return torch.cat([local_tensor(p).detach().flatten().to(self.dtype) for p in self.params])

    def write(self, point: Tensor) -> None:
        """Set the parameters to ``point`` (d,)."""
        torch._foreach_copy_([local_tensor(p) for p in self.params], list(self.one(point).values()))

    def one(self, point: Tensor) -> dict[str, Tensor]:
        """Views of ``point`` (d,), shaped like the parameters."""
        parts = zip(self._names, point.split(self._sizes), self._shapes, strict=True)
        return {name: part.view(shape) for name, part, shape in parts}

    def many(self, points: Tensor) -> dict[str, Tensor]:
        """Views of ``points`` (n, d), each ``(n, *shape)``."""
        parts = zip(self._names, points.split(self._sizes, 1), self._shapes, strict=True)
        return {name: part.view(len(points), *shape) for name, part, shape in parts}

    def of_runs(self, points: Tensor) -> dict[str, Tensor]:
        """The same of ``points`` (runs, n, d), kept because the same buffer comes again."""
        if self._last is None or self._last[0] is not points:
            self._last = (points, self.many(points.flatten(0, 1)))
        return self._last[1]
