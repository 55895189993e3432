"""Training programs with a Trainer."""

import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_methods.hyperparameters import live_arguments
from lit_methods.precision import load_unrounded
from lit_methods.vi.programmable.objectives import LIBRARY, Estimate, Objective, log_weights
from lit_methods.vi.programmable.programs import Prediction, Trace, program
from lit_methods.vi.programmable.tape import batched


class ProgrammableVI(LightningModule):
    """Variational inference of any model, with any guide and any objective, all of them programs.

    Use it when a model is easier to write than its gradient: discrete and continuous latent variables together, guides
    with auxiliary variables, bounds other than the ELBO. For a plain variational autoencoder a training step written
    by hand does the same.

    The programs are called with the batch. Logs ``train/loss``, the negative mean over problems of the objective's
    value, and ``train/elbo``, the same with its sign; ``val`` and ``test`` likewise. ``predict`` returns draws of the
    guide, by site.

    Cost of a step: forward and backward passes of the networks, ``num_samples * num_particles`` times as large, times
    the number of branches of enumerated sites; on accelerators one wait, for the check that the value is finite. Under
    DDP ranks draw their own samples, and gradients are averaged. Networks may run in bfloat16 (``bf16-mixed``): draws
    and log-densities stay in float32.

    Args:
        model: a module whose ``forward(batch)`` calls ``sample`` and ``observe``, or ``program(function)``, whose
            parameters are not trained.
        guide: the same for the approximate posterior; also ``marginal(...)`` or ``normalize(...)`` of programs.
        objective: one of ``lit_methods.vi.programmable``: elbo, iwelbo, hvi, iwhvi, diwhvi, forward_kl, wake_q, wake_p,
            reweighted_wake_sleep, symmetric, renyi, vimco; or what ``@objective`` has made, or its import path.
        num_samples: independent estimates that are averaged for each problem, >= 1.
        eval_samples: the same in validation and test, >= 1; ``None``: ``num_samples``.
        num_particles: of objectives that take particles, >= 1; ``None``: their default.
        settings: other settings of the objective by name, as ``{alpha: 0.5}`` or ``{keep: [x, y]}``.
        model_objective: another objective that trains the model alone, as ``wake_p``; ``objective`` then trains the
            guide alone. Parameters that they share would be trained by neither, and are refused.
        batch_dims: leading dimensions of the batch's first tensor that count independent problems, >= 0: 1 when every
            row has latent variables of its own, 0 when all rows share them (then scale ``observe`` by N / B).
        chunk_size: at most so many samples at a time, >= 1: less memory, more time; not with ``model_objective``.
            ``None``: all.
        max_branches: largest product of the numbers of values that enumerated sites try, >= 1.
        baseline_lr: learning rate of parameters with ``baseline`` in their names, > 0; ``None``: that of the others.
        optimizer: builds the optimizer.

    Raises:
        ValueError: an argument out of range; in training: what the programs refuse, or an objective that sends no
            parameter a gradient.

    Example:
        >>> import torch
        >>> from torch.distributions import Normal
        >>> from lit_methods.vi.programmable import observe, program, sample
        >>> class Guide(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.loc = torch.nn.Parameter(torch.zeros(()))
        ...     def forward(self, batch):
        ...         sample("z", Normal(self.loc, 0.7))
        >>> def model(batch):
        ...     z = sample("z", Normal(0.0, 1.0))
        ...     observe("x", Normal(z, 1.0), batch[0])
        >>> module = ProgrammableVI(program(model), Guide())
        >>> module.estimate([torch.ones(5)]).value.shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        objective: str | Callable[..., Any] = "elbo",
        num_samples: int = 1,
        num_particles: int | None = None,
        settings: dict[str, Any] | None = None,
        model_objective: str | Callable[..., Any] | None = None,
        eval_samples: int | None = None,
        batch_dims: int = 1,
        chunk_size: int | None = None,
        max_branches: int = 4096,
        baseline_lr: float | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(load_unrounded)
        for name, value, low in (
            ("num_samples", num_samples, 1),
            ("num_particles", num_particles, 1),
            ("eval_samples", eval_samples, 1),
            ("batch_dims", batch_dims, 0),
            ("chunk_size", chunk_size, 1),
            ("max_branches", max_branches, 1),
        ):
            if value is not None and value < low:
                raise ValueError(f"{name} must be >= {low}, got {value}")
        if baseline_lr is not None and not 0 < baseline_lr < float("inf"):
            raise ValueError(f"baseline_lr must be > 0 and finite, got {baseline_lr}")
        if model_objective is not None and chunk_size is not None:
            raise ValueError(f"chunk_size must be None with model_objective, got {chunk_size}")
        shared = {id(p) for p in model.parameters()} & {id(p) for p in guide.parameters()}
        if model_objective is not None and shared:
            raise ValueError(
                f"model_objective must be None for a model and a guide that share parameters, got {model_objective!r}"
            )
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.model = program(model)
        self.guide = program(guide)
        self.num_samples = num_samples
        self.eval_samples = eval_samples or num_samples
        self.batch_dims = batch_dims
        self.chunk_size = chunk_size
        self.max_branches = max_branches
        self.baseline_lr = baseline_lr
        self.optimizer = optimizer
        options = dict(settings or {})
        if num_particles is not None:
            options["num_particles"] = num_particles
        self.objective = _build("objective", objective, self.model, self.guide, options)
        self.model_objective: Objective | None = None
        if model_objective is not None:
            particles = {} if num_particles is None else {"num_particles": num_particles}
            self.model_objective = _build("model_objective", model_objective, self.model, self.guide, particles)
        self._looked_at_gradients = False

    def batch_shape(self, batch: Any) -> tuple[int, ...]:
        """The sizes of the problems of a batch."""
        first = _first_tensor(batch)
        if first is None or first.ndim < self.batch_dims:
            raise ValueError(
                f"batch_dims must be <= the dimensions of the batch's first tensor, "
                f"{None if first is None else list(first.shape)}, got {self.batch_dims}"
            )
        return tuple(first.shape[: self.batch_dims])

    def estimate(self, batch: Any, objective: Objective | None = None, num_samples: int | None = None) -> Estimate:
        """Value and surrogate for each problem of the batch; by default of ``objective`` with ``num_samples``."""
        return (objective or self.objective)(
            batch,
            batch_shape=self.batch_shape(batch),
            num_samples=num_samples or self.num_samples,
            chunk_size=self.chunk_size,
            max_branches=self.max_branches,
        )

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Draws of the guide by site, ``(num_samples, *batch, *event)``, without the first dimension for one sample."""
        return dict(self.sample_posterior(batch, self.num_samples))

    @torch.no_grad()
    def sample_posterior(self, batch: Any, num_samples: int = 1) -> Trace:
        """Draws of the guide by site; ``num_samples`` >= 1 of them are a leading dimension when there are several."""
        with batched(self.batch_shape(batch), num_samples):
            return self.guide.simulate(batch).trace

    @torch.no_grad()
    def posterior_predictive(self, batch: Any, num_samples: int = 1) -> Prediction:
        """Observations that the model draws given draws of the guide, the data in their place, and its return value."""
        with batched(self.batch_shape(batch), num_samples):
            return self.model.predict(self.guide.simulate(batch).trace, batch)

    @torch.no_grad()
    def log_weights(self, batch: Any, num_particles: int) -> Tensor:
        """Log-weights of draws of the guide, ``(num_particles, *batch)``: what importance sampling goes by."""
        with batched(self.batch_shape(batch)):
            return log_weights(self.model, self.guide, num_particles, batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Minus the mean surrogate; and the loss of baseline networks."""
        if self.model_objective is None:
            estimates = [self.estimate(batch)]
        else:
            with _frozen(self.model):
                estimates = [self.estimate(batch)]
            with _frozen(self.guide):
                estimates.append(self.estimate(batch, self.model_objective))
        value = estimates[0].value.mean()
        terms = [-estimate.surrogate.mean() for estimate in estimates] + [e.baseline_loss for e in estimates]
        trained = [term for term in terms if term.requires_grad]
        if not trained:
            raise ValueError(f"no parameter receives a gradient from objective {self.objective!r}")
        self.log_dict({"train/loss": -value, "train/elbo": value}, batch_size=self._count(batch))
        return torch.stack(trained).sum()

    def on_after_backward(self) -> None:
        """Say once which parameters got no gradient."""
        if self._looked_at_gradients:
            return
        self._looked_at_gradients = True
        without = [name for name, p in self.named_parameters() if p.requires_grad and p.grad is None]
        if without:
            rank_zero_warn(f"parameters without a gradient from objective {self.objective!r}: {without}")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the objective's value."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the objective's value."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Draws of the guide by site, as :meth:`forward` gives them."""
        return self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The injected optimizer, with a group of its own for baselines if they have their own learning rate."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        if self.baseline_lr is None:
            return self.optimizer(p for _, p in named)
        baselines = [p for name, p in named if "baseline" in name]
        if not baselines:
            raise ValueError(f"baseline_lr must be None without parameters named baseline, got {self.baseline_lr}")
        others = [p for name, p in named if "baseline" not in name]
        groups: Any = [{"params": others}, {"params": baselines, "lr": self.baseline_lr}]
        return self.optimizer(groups)

    def _evaluate(self, batch: Any, stage: str) -> None:
        with torch.no_grad():
            value = self.estimate(batch, num_samples=self.eval_samples).value.mean()
        logged = {f"{stage}/loss": -value, f"{stage}/elbo": value}
        self.log_dict(logged, sync_dist=True, batch_size=self._count(batch))

    def _count(self, batch: Any) -> int:
        return max(torch.Size(self.batch_shape(batch)).numel(), 1)


def _first_tensor(batch: Any) -> Tensor | None:
    """The first tensor of nested mappings and sequences."""
    if isinstance(batch, Tensor):
        return batch
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((found for found in map(_first_tensor, parts) if found is not None), None)


def _build(argument: str, objective: Any, model: nn.Module, guide: nn.Module, settings: dict[str, Any]) -> Objective:
    if isinstance(objective, str):
        try:
            objective = LIBRARY[objective] if objective in LIBRARY else pkgutil.resolve_name(objective)
        except (ValueError, ImportError, AttributeError) as error:
            raise ValueError(
                f"{argument} must be one of {sorted(LIBRARY)}, or an import path, got {objective!r}"
            ) from error
    known = getattr(objective, "settings", None)
    if known is None:
        known = list(inspect.signature(objective).parameters)[2:]
    unknown = [name for name in settings if name not in known]
    if unknown:
        name = "num_particles" if unknown == ["num_particles"] else "settings"
        raise ValueError(f"{name} must be None unless {argument} takes it: it takes {known}, got {unknown}")
    built = objective(model, guide, **settings)
    if not isinstance(built, Objective):
        raise ValueError(f"{argument} must make an Objective of a model and a guide, got {type(built).__name__}")
    return built


@contextmanager
def _frozen(part: nn.Module) -> Iterator[None]:
    """Send no gradient to a part."""
    parameters = [p for p in part.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
