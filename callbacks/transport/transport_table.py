"""Iterations and time of Sinkhorn-Newton-Sparse and of Sinkhorn, on assignments and on images of the training data."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_methods.transport import SinkhornNewton, grid_points

Problem = tuple[Tensor, Tensor | None, Tensor | None]


class TransportTable(Callback):
    """When ``fit`` ends, solve the problems of Tang et al. (2024, Table 1) with both algorithms and print one table.

    The problems: assignment with costs uniform in [0, 1]; and mass moved between the two first images of the first
    training batch (batches with an ``x`` of shape ``(batch, 1, height, width)``; others give no image problem),
    enlarged to ``image_size``, with 0.01 added to every pixel and the squared or the absolute distances of pixels over
    their maximum as cost. Everything is float64 on the CPU, on rank zero. The rows are also in ``rows``.

    Args:
        eta: inverse regularization, > 0.
        assignment_size: n of the assignment problem, >= 1.
        image_size: height and width of the images, >= 2.
        tol: marginal error to reach, > 0.
        max_sweeps: sweeps after which Sinkhorn gives up, >= 1.
        seed: of the costs of the assignment, >= 0.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        eta: float = 1200.0,
        assignment_size: int = 500,
        image_size: int = 28,
        tol: float = 1e-10,
        max_sweeps: int = 100_000,
        seed: int = 0,
    ) -> None:
        for name, value, low in (
            ("assignment_size", assignment_size, 1),
            ("image_size", image_size, 2),
            ("max_sweeps", max_sweeps, 1),
            ("seed", seed, 0),
        ):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        self.solvers = {
            "SNS": SinkhornNewton(eta, tol=tol),
            "SNS, eps_scaling=0": SinkhornNewton(eta, tol=tol, eps_scaling=0),
            "Sinkhorn": SinkhornNewton(eta, tol=tol, warmup=max_sweeps, max_newton=0),
        }
        self.assignment_size = assignment_size
        self.image_size = image_size
        self.seed = seed
        self.images: list[Tensor] = []
        self.rows: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """The images and the rows."""
        return {"images": self.images, "rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the images of the first run."""
        self.images, self.rows = list(state_dict["images"]), list(state_dict["rows"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep two images."""
        x = getattr(batch, "x", None)
        if not self.images and isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] == 1 and len(x) > 1:
            self.images = [image.detach().double().cpu() for image in x[:2]]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Solve and print."""
        if not trainer.is_global_zero:
            return
        self.rows = [row for name, problem in self._problems().items() for row in self._solve(name, *problem)]
        print("\n" + _text(self.rows))

    def _problems(self) -> dict[str, Problem]:
        generator = torch.Generator().manual_seed(self.seed)
        n = self.assignment_size
        cost = torch.rand(n, n, generator=generator, dtype=torch.float64)
        problems: dict[str, Problem] = {f"assignment, n={n}": (cost, None, None)}
        if self.images:
            size = (self.image_size, self.image_size)
            images = nn.functional.interpolate(torch.stack(self.images), size=size, mode="bilinear").flatten(1) + 0.01
            a, b = images / images.sum(1, keepdim=True)
            grid = grid_points(*size).double()
            for name, cost in (("L2", torch.cdist(grid, grid).square()), ("L1", torch.cdist(grid, grid, p=1))):
                problems[f"images, {name} cost"] = cost / cost.max(), a, b
        return problems

    def _solve(self, name: str, cost: Tensor, a: Tensor | None, b: Tensor | None) -> list[dict[str, Any]]:
        rows = []
        for solver_name, solver in self.solvers.items():
            start = time.perf_counter()
            result = solver(cost, a, b)
            rows.append(
                {
                    "problem": name,
                    "solver": solver_name,
                    "seconds": round(time.perf_counter() - start, 3),
                    "sweeps": int(result.n_sinkhorn),
                    "steps": int(result.n_newton),
                    "error": f"{float(result.marginal_error):.1e}",
                    "value": float(result.value),
                }
            )
        return rows


def _text(rows: Sequence[dict[str, Any]]) -> str:
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)
