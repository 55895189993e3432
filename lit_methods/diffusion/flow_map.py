"""Networks that jump along the probability-flow ODE in one or a few steps."""

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lit_methods.diffusion.conditioning import Conditioning
from lit_methods.diffusion.denoiser import Denoiser
from lit_methods.diffusion.derivatives import Method
from lit_methods.diffusion.grids import Grid, as_grid
from lit_methods.diffusion.module import GenerativeModule
from lit_methods.diffusion.objectives import CTM, Learner, LogVariance, Objective, as_objective
from lit_methods.diffusion.processes import Generators, draw_noise
from lit_methods.diffusion.sampling import OnStep
from lit_methods.hyperparameters import live_arguments


class FlowMap(GenerativeModule):
    """Train a network whose one call replaces many steps of a solver, from data or from a teacher.

    ``meanflow`` learns mean velocities and ``ctm`` jumps between any two times; ``consistency`` and ``scm`` learn jumps
    to the data, and more steps add noise again between them. MeanFlow and sCM differentiate the network along the path
    (``jvp``).

    Logs ``train/loss`` per step and ``{val,test}/loss`` per epoch. Prediction makes a sample for each row of the batch.

    Example:
        >>> model = FlowMap(TimeMLP([1, 8, 8], two_times=True), objective="meanflow")

    Args:
        net: ``net(x, t)``, with ``cond`` as third argument for a conditional model; ``net(..., s=s)`` for ``meanflow``
            and ``ctm``. Gives a prediction shaped like ``x``.
        objective: an object, or one of ``meanflow consistency scm ctm``.
        teacher: a trained denoiser of any process for ``consistency``, ``scm`` and ``ctm``; frozen, and not saved in
            checkpoints.
        sigma_data: standard deviation of the data, > 0; ``meanflow`` does not need it.
        conditioning: what the model is told of a sample; ``None``: nothing.
        steps: jumps that make a sample, >= 1.
        jvp: ``"forward"``, or ``"finite_difference"`` for networks without forward-mode derivative (UNet2DModel with
            attention, flash attention, FSDP).
        optimizer: builds the optimizer.
        lr_scheduler: builds a learning rate scheduler, stepped after every optimizer step.
        seed: of times and noise, >= 0; ``None`` draws one from torch's generator.

    Raises:
        ValueError: an argument out of range, or a teacher that the objective does not take.
    """

    def __init__(
        self,
        net: nn.Module,
        objective: str | Objective = "meanflow",
        teacher: Denoiser | None = None,
        sigma_data: float = 0.5,
        conditioning: Conditioning | None = None,
        steps: int = 1,
        jvp: Method = "forward",
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=live_arguments(locals()))
        if jvp not in ("forward", "finite_difference"):
            raise ValueError(f"jvp must be 'forward' or 'finite_difference', got {jvp!r}")
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        self.objective = as_objective(objective)
        if teacher is not None and not self.objective.takes_teacher:
            raise ValueError(f"teacher must be None for {type(self.objective).__name__}, which learns from data only")
        if isinstance(self.objective, CTM) and teacher is None:
            warnings.warn(
                "objective='ctm' without a teacher found the mean of the data but not its spread; give a teacher"
            )
        process = self.objective.process(sigma_data)
        self.denoiser = Denoiser(
            net, process, self.objective.prediction, self.objective.precondition, sigma_data, conditioning
        )
        self.steps = steps
        self.jvp = jvp
        self.stage = 0
        self.log_variance = LogVariance() if self.objective.learns_variance else None
        # In a tuple the teacher is no part of the module: not saved, not trained, not wrapped by DDP.
        self._teacher = () if teacher is None else (teacher.eval().requires_grad_(False).under(process),)
        self.begin(optimizer, lr_scheduler, seed)

    @property
    def teacher(self) -> Denoiser | None:
        """The teacher as a denoiser of this model's process."""
        return self._teacher[0] if self._teacher else None

    def loss(self, x0: Tensor, cond: Any = None, generator: torch.Generator | None = None) -> Tensor:
        """Mean loss of data at random times, ``()``."""
        return self.objective.losses(self._learner(), x0, cond, generator).mean()

    def _learner(self) -> Learner:
        return Learner(self.denoiser, self.teacher, self.jvp, self.steps_drawn, self.stage, self.log_variance)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        cond: Any = None,
        *,
        steps: int | None = None,
        grid: str | Grid | None = None,
        generator: Generators = None,
        x_init: Tensor | None = None,
        shape: Sequence[int] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Make samples.

        Args:
            n: number of samples, >= 1.
            cond: one condition per sample.
            steps: number of jumps, >= 1; default: that of the constructor.
            grid: where they begin; ``None``: what suits the process.
            generator: source of randomness; a list has one for each sample.
            x_init: noise to start from.
            shape: of one sample; default: that of the training data.
            on_step: called with the time, the samples there and those after the jump.

        Raises:
            ValueError: an argument out of range, or no shape is known.
        """
        process = self.denoiser.process
        times = as_grid(grid, process).times(process, self.steps if steps is None else steps).tolist()
        if x_init is None:
            x_init = process.prior_std * draw_noise(self.known_shape(n, shape), generator, self.device)
        x = x_init

        def noise(x: Tensor) -> Tensor:
            return draw_noise(x.shape, generator, x.device, x.dtype)

        for t, s in pairwise(times):
            after = self.objective.jump(self.denoiser, x, t, s, cond, noise)
            if on_step is not None:
                on_step(t, x, after)
            x = after
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FlowMap":
        """Move the teacher along."""
        for teacher in self._teacher:
            teacher._apply(fn)
        return super()._apply(fn, recurse)
