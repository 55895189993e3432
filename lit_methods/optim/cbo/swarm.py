"""What the gradient-free particle optimizers share: evaluation, the consensus point and checkpoints."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from lit_methods.optim.cbo.closures import Evaluate, Particles, batched, needs_argument, one_by_one
from lit_methods.optim.cbo.consensus import alpha_for_sample_size, consensus_weights, weighted_mean
from lit_methods.optim.cbo.layout import ParticleLayout
from lit_methods.optim.cbo.ranks import ParticleRanks
from lit_methods.optim.cbo.settings import MOVED, divisor
from lit_methods.optim.foundation.closures import RepeatedClosure
from lit_methods.optim.foundation.finite import warn_of_skipped_step
from lit_methods.optim.foundation.flat import by_column, by_parameter, is_dtensor, shards
from lit_methods.optim.foundation.groups import check_lr, check_own_state, check_real, check_shared

_RANK_STRIDE = 0x9E3779B97F4A7C15  # apart from one another for any seed


class NoFiniteLossError(Exception):
    """Of all particles none has a finite loss: there is no consensus point."""


class ParticleOptimizer(Optimizer):
    """Keeps N particles, each a value of all parameters, in one ``(runs, N, d)`` buffer; subclasses say how they move.

    The buffer is float32, or float64 where any parameter is. Parameters that do not require gradients are left alone.
    """

    moved_arguments: ClassVar[dict[str, str]] = MOVED
    gradients_cleared = False
    state: dict[Any, Any]  # type: ignore[assignment]  # the swarm is no one parameter's: it has the key "swarm"
    _shared: tuple[str, ...] = ("num_particles", "num_runs", "alpha", "effective_sample_size", "alpha_growth")
    _by_particle: tuple[str, ...] = ("particles",)  # state of shape (runs, N, d)
    _losses_by_particle: tuple[str, ...] = ()  # state of shape (runs, N)
    _by_run: tuple[str, ...] = ("consensus", "previous", "best")  # state of shape (runs, d)
    ranks: ParticleRanks
    _cached_layout: ParticleLayout | None
    _buffers: dict[tuple[str, int, int], Tensor]
    _generator: torch.Generator | None
    _ready: bool
    _consolidated: dict[str, Any] | None
    _low: Tensor | None  # each run's lowest loss of this step, so far
    _lowest: float  # loss of this step
    _lows: list[float]  # each run's lowest loss among the last particle batch
    _changes: list[float]  # how far each run's consensus moved last, in the coordinate that moved most

    def __init__(
        self,
        params: ParamsT | nn.Module,
        defaults: dict[str, Any],
        seed: int | None,
        shard: Literal["data", "particles"],
        process_group: dist.ProcessGroup | None,
    ) -> None:
        if shard not in ("data", "particles"):
            raise ValueError(f"shard must be 'data' or 'particles', got {shard!r}")
        if seed is not None and seed < 0:
            raise ValueError(f"seed must be >= 0, or None for one from the global generator, got {seed}")
        self._seed, self.ranks = seed, ParticleRanks(shard, process_group)
        self._generator = None
        self._forget()
        super().__init__(params.named_parameters() if isinstance(params, nn.Module) else params, defaults)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.gradients_cleared = True
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: each particle gets further coordinates, drawn like those at the start."""
        check_shared(param_group, self.defaults, self._shared)
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            check_real(self.param_groups[-1]["params"])
            self._check_shards()
        except ValueError:
            self.param_groups.pop()
            raise
        self._forget()

    @property
    def particles(self) -> Particles:
        """Parameter name (or position, where there are no names) -> ``(N, *shape)``, views of this rank's particles.

        With several runs ``(num_runs * N, *shape)``, run after run. With DTensor parameters all shapes, here and in the
        other methods, are those of this rank's shards.
        """
        swarm = self._prepare()
        return self.layout.many(swarm["particles"].flatten(0, 1))

    def consensus(self) -> Particles:
        """Parameter name -> the last consensus point, which is also what the parameters hold (up to their dtype).

        With several runs it is that of the run with the lowest loss in the last step.
        """
        swarm = self._prepare()
        return self.layout.one(swarm["consensus"][swarm["leader"]])

    def consensus_of_runs(self) -> Particles:
        """Parameter name -> every run's last consensus point, ``(num_runs, *shape)``."""
        swarm = self._prepare()
        return self.layout.many(swarm["consensus"])

    def best_particle(self) -> Particles:
        """Parameter name -> the particle with the lowest loss so far, in any run; NaN before the first step.

        On changing data batches the lowest loss says little. With ``shard="particles"`` a collective call.
        """
        swarm = self._prepare()
        losses = self.ranks.gather_particles(swarm["best_loss"], 0)
        return self.layout.one(self.ranks.gather_particles(swarm["best"], 0)[losses.argmin()])

    def best_losses(self) -> Tensor:
        """Every run's lowest loss so far, ``(num_runs,)``; with ``shard="particles"`` a collective call."""
        losses = self._prepare()["best_loss"]
        return self.ranks.gather_particles(losses[None], 0).amin(0)

    @torch.no_grad()
    def variance(self) -> Tensor:
        """Variance of the particles in each coordinate, ``(d,)``, or the mean of the runs' variances.

        With ``shard="particles"`` a collective call.
        """
        particles = self._prepare()["particles"]
        mean = self.ranks.sum_over_particles(particles.sum(1, keepdim=True)) / self.num_particles
        return self.ranks.sum_over_particles((particles - mean).square().sum(1)).mean(0) / self.num_particles

    def spread(self) -> float:
        """Euclidean norm of :meth:`variance`, over all ranks: a collective call where they share the swarm."""
        return float(self.ranks.norm(self.variance()))

    def reduce_particles(self, num_particles: int) -> None:
        """Go on with fewer particles: the first ones, which are as good as any.

        Args:
            num_particles: from 1 to the present number.
        """
        if not 1 <= num_particles <= self.num_particles:
            raise ValueError(f"num_particles must be in [1, {self.num_particles}], got {num_particles}")
        swarm = self._prepare()
        for key in (*self._by_particle, *self._losses_by_particle):
            swarm[key] = swarm[key][:, : self.ranks.local(num_particles)].clone()
        self._set_shared("num_particles", num_particles)
        batch = self.param_groups[0].get("particle_batch_size")
        if batch is not None:
            self._set_shared("particle_batch_size", divisor(num_particles, batch))

    @property
    def num_particles(self) -> int:
        """N of each run, on all ranks together."""
        return self.param_groups[0]["num_particles"]

    @property
    def num_runs(self) -> int:
        """Number of independent swarms."""
        return self.param_groups[0]["num_runs"]

    def step(self, closure: Callable[..., Any] | None = None) -> Any:
        """Evaluate particles, move them, and write the consensus point into the parameters.

        Args:
            closure: one of

                - ``closure(particles) -> losses``: a dict of ``(n, *shape)`` tensors (views: neither keep nor change
                  them) to ``(n,)`` losses; see :func:`~lit_methods.optim.particle_losses`;
                - ``closure() -> such a function``, for wrappers that pass no arguments (Lightning's);
                - ``closure() -> loss`` of the parameters' present values, as other optimizers take it. It is called
                  once for the present values and once more for every evaluated particle: the slow way, and the only
                  one for DTensor parameters.

        Returns:
            The lowest loss of this step; with the third kind of closure the loss at the present values. ``None`` if
            the closure returns ``None``.

        Raises:
            ValueError: losses of the wrong shape; a closure of the first two kinds with DTensor parameters.
            RuntimeError: no closure, or the particles have diverged.
        """
        with torch.no_grad():
            return self._step(closure)

    def _step(self, closure: Callable[..., Any] | None) -> Any:
        swarm = self._prepare()
        if closure is None:
            if any(group["lr"] != 0 for group in self.param_groups):
                raise RuntimeError(
                    f"{type(self).__name__}.step needs a closure that evaluates the loss. A GradScaler (Lightning's "
                    "precision='16-mixed') passes none: use bf16-mixed or 32 bit"
                )
            return None
        loss, losses_of = None, closure
        if not needs_argument(closure):
            loss = losses_of = RepeatedClosure(self, closure)()
            if loss is None:
                return None
        evaluate = (
            batched(self.layout, self.ranks, losses_of)
            if callable(losses_of)
            else one_by_one(self.layout, self.ranks, closure)
        )
        self._consolidated = self._low = None
        steps = swarm.get("steps")
        try:
            self._advance(swarm, evaluate)
        except NoFiniteLossError:
            if steps is not None:
                swarm["steps"] = steps
            warn_of_skipped_step(self, "no particle has a finite loss; check the loss, or start with a smaller spread")
            return self._lowest if callable(losses_of) else loss
        if self.param_groups[0]["alpha_growth"] != 1:
            self._set_shared("alpha", self.param_groups[0]["alpha"] * self.param_groups[0]["alpha_growth"])
        self.layout.write(swarm["consensus"][swarm["leader"]])
        if callable(losses_of):
            return self._lowest
        for p in self.layout.params:
            p.grad = None  # of the closure's backward passes, or they would look like accumulated ones in the next step
        return loss

    def _advance(self, swarm: dict[str, Any], evaluate: Evaluate) -> None:
        """Move the particles and the consensus point."""
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        if group["num_runs"] < 1:
            raise ValueError(f"num_runs must be >= 1, got {group['num_runs']}")
        check_lr(group["lr"])
        if not group["alpha"] >= 0:
            raise ValueError(f"alpha must be >= 0, got {group['alpha']}")
        share = group["effective_sample_size"]
        if share is not None and not 0 < share < 1:
            raise ValueError(f"effective_sample_size must be in (0, 1), or None, got {share}")

    def _common_losses(self, losses: Tensor) -> Tensor:
        """The losses ``(runs, n)`` of this rank's particles on all ranks' data; infinite where they are not finite."""
        return self.ranks.mean_over_data(losses).nan_to_num(math.inf, math.inf, math.inf)

    def _weigh(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of this rank's particles ``(runs, n)``, which sum to 1 on all ranks, and the lowest losses."""
        losses = self.ranks.gather_particles(losses, 1)
        lowest = losses.amin(1)
        share, alpha = self.param_groups[0]["effective_sample_size"], self.param_groups[0]["alpha"]
        if share is not None:
            alpha = alpha_for_sample_size(losses, share)
        weights = consensus_weights(losses, alpha, lowest)
        return (weights.chunk(self.ranks.size, 1)[self.ranks.rank] if self.particles_sharded else weights), lowest

    def _find_consensus(self, swarm: dict[str, Any], points: Tensor, losses: Tensor, last: bool = True) -> Tensor:
        """The consensus points ``(runs, d)`` of ``points`` (runs, n, d), identical on all ranks.

        Args:
            swarm: the state, which learns the consensus points and the best particles.
            points: this rank's.
            losses: their :meth:`_common_losses`.
            last: no other particle batch follows in this step. It is then that the host learns how the step went.
        """
        weights, lowest = self._weigh(losses)
        point = self.ranks.sum_over_particles(weighted_mean(points, weights))
        self._settle(swarm, points, losses, lowest, point, last)
        return swarm["consensus"]

    def _settle(
        self, swarm: dict[str, Any], points: Tensor, losses: Tensor, lowest: Tensor, point: Tensor, last: bool = True
    ) -> None:
        """Make ``point`` the consensus of all runs with a finite loss, and keep the best particles."""
        for group, new, old in self.layout.parts(point, swarm["consensus"]):
            if group["lr"] == 0:
                new.copy_(old)
        own = losses.amin(1) if self.particles_sharded else lowest
        self._low = lowest if self._low is None else torch.minimum(lowest, self._low)
        if not last or self._end_step(swarm, lowest, own, point):
            better = (own < swarm["best_loss"])[:, None]
            best = points.take_along_dim(losses.argmin(1)[:, None, None], 1)[:, 0]
            swarm["best"] = torch.where(better, best, swarm["best"])
            swarm["best_loss"] = torch.minimum(own, swarm["best_loss"])
        if not last or math.inf in self._lows:
            point = torch.where((lowest < math.inf)[:, None], point, swarm["consensus"])
        swarm["previous"], swarm["consensus"] = swarm["consensus"], point

    def _end_step(self, swarm: dict[str, Any], lowest: Tensor, own: Tensor, point: Tensor) -> bool:
        """Learn how the step went, the one host synchronisation: whether any run has a better particle than before."""
        assert self._low is not None
        changes = self.ranks.largest(point - swarm["consensus"])
        found = torch.stack([self._low, lowest, changes, swarm["best_loss"] - own])
        low, self._lows, self._changes, gains = found.tolist()
        self._lowest = min(low)
        if self._lowest == math.inf:
            raise NoFiniteLossError
        if any(x < math.inf and not math.isfinite(change) for x, change in zip(self._lows, self._changes, strict=True)):
            raise RuntimeError("the particles have diverged; use a smaller sigma or lr")
        swarm["leader"] = low.index(self._lowest)
        return any(gain > 0 for gain in gains)

    def _buffer(self, name: str, rows: int, columns: int) -> Tensor:
        """Scratch memory ``(rows, columns)``, the same tensor while the size stays the same."""
        key = (name, rows, columns)
        if key not in self._buffers:
            self._buffers[key] = self.state["swarm"]["particles"].new_empty(rows, columns)
        return self._buffers[key]

    def fill_normal(self, x: Tensor, mean: float, std: float) -> None:
        """Fill with normal numbers; this is where all noise comes from."""
        x.normal_(mean, std, generator=self._generator)

    def noise(self, shape: Sequence[int], mean: float, std: float) -> Tensor:
        """Normal numbers ``(runs, n, d)`` in scratch memory."""
        runs, number, dim = shape
        noise = self._buffer("noise", runs * number, dim)
        self.fill_normal(noise, mean, std)
        return noise.view(runs, number, dim)

    def _set_shared(self, name: str, value: Any) -> None:
        self.defaults[name] = value
        for group in self.param_groups:
            group[name] = value

    @property
    def layout(self) -> ParticleLayout:
        """Where every parameter is in the coordinates."""
        if self._cached_layout is None:
            self._cached_layout = ParticleLayout(self.param_groups)
            self._check_shards()
        return self._cached_layout

    def _check_shards(self) -> None:
        """Learn whether ranks hold parts of the parameters; all of them must then be split over all ranks."""
        trained = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        self.ranks.own_coordinates = any(is_dtensor(p) for p in trained)
        if not self.ranks.own_coordinates:
            return
        if self.ranks.shard == "particles":
            raise ValueError("shard must be 'data' with DTensor parameters (FSDP2), got 'particles'")
        if any(shards(p) != self.ranks.size for p in trained):
            raise ValueError(
                f"params must all be sharded over all {self.ranks.size} ranks where some are DTensors: fully_shard "
                "the root module on a one-dimensional mesh, or freeze what is not sharded"
            )

    def _forget(self) -> None:
        """Drop what is derived from groups and state."""
        self._cached_layout = self._consolidated = None
        self._buffers = {}
        self._ready = False

    def _prepare(self) -> dict[str, Any]:
        """The swarm and its generator: made at the first use, brought up to date after anything that may move them."""
        former = self._cached_layout
        if former is not None and not former.holds():
            self._forget()
        layout = self.layout
        device, dtype = layout.params[0].device, layout.dtype
        if self._ready and self._generator is not None and self._generator.device == device:
            return self.state["swarm"]
        swarm = self.state.setdefault("swarm", {})
        if "seed" not in swarm:
            swarm["seed"] = self._agree_on_seed(device)
            swarm["generators"] = []
        for key in (*self._by_particle, *self._losses_by_particle, *self._by_run, "best_loss"):
            if key in swarm:
                swarm[key] = swarm[key].to(device, dtype)
        if self._generator is None or self._generator.device != device:
            self._generator = self._make_generator(swarm, device)
        current = layout.current()
        runs, rows = self.num_runs, self.ranks.local(self.num_particles)
        if "particles" not in swarm:
            swarm["particles"] = self._initial(current, runs * rows).view(runs, rows, len(current))
            swarm["consensus"] = current.repeat(runs, 1)
            swarm["previous"] = swarm["consensus"].clone()
            swarm["best"] = torch.full_like(swarm["consensus"], math.nan)
            swarm["best_loss"] = current.new_full((runs,), math.inf)
            swarm["leader"] = 0
            self._warn(sum(p.numel() for p in layout.params))
        elif former is not None and former is not layout:
            self._follow_frozen(swarm, former, current)
        elif (known := swarm["particles"].shape[2]) < len(current):  # a parameter group was added
            self._append(swarm, current[known:])
        elif known > len(current):
            raise ValueError(f"the particles have {known} coordinates, the trainable parameters {len(current)}")
        self._complete(swarm)
        self._ready = True
        return swarm

    def _append(self, swarm: dict[str, Any], current: Tensor) -> None:
        """Give the particles further coordinates, drawn as at the start, where the parameters hold ``current``."""
        runs, rows, _ = swarm["particles"].shape
        new = self._initial(current, runs * rows).view(runs, rows, len(current))
        swarm["particles"] = torch.cat([swarm["particles"], new], 2)
        for key in self._by_run:
            swarm[key] = torch.cat([swarm[key], current.expand(runs, -1)], 1)

    def _follow_frozen(self, swarm: dict[str, Any], former: ParticleLayout, current: Tensor) -> None:
        """Drop the coordinates of parameters frozen since the last step, and draw those of thawed ones."""
        known = {id(p) for p in former.params}
        kept, thawed = ([p for p in self.layout.params if (id(p) in known) == have] for have in (True, False))
        for key in (*self._by_particle, *self._by_run):
            swarm[key] = swarm[key][..., former.columns_of(kept).to(current.device)]
        for key in ("best_loss", *self._losses_by_particle):  # of other values of what is frozen now
            swarm[key].fill_(math.inf)
        if thawed:
            columns = [self.layout.columns_of(params).to(current.device) for params in (kept, thawed)]
            self._append(swarm, current[columns[1]])
            self._complete(swarm)
            for key in (*self._by_particle, *self._by_run):
                swarm[key] = swarm[key][..., torch.cat(columns).argsort()]

    def _initial(self, current: Tensor, rows: int) -> Tensor:
        """New particles ``(rows, d)``."""
        raise NotImplementedError

    def _complete(self, swarm: dict[str, Any]) -> None:
        """Make or extend the further state of a subclass."""

    @staticmethod
    def _extend(swarm: dict[str, Any], key: str, start: Tensor) -> None:
        """Give the state ``key`` the coordinates of ``start`` that it lacks."""
        known = swarm[key].shape[2] if key in swarm else 0
        if known < start.shape[2]:
            swarm[key] = torch.cat([swarm[key], start[..., known:]], 2) if known else start.clone()

    def _warn(self, dim: int) -> None:
        """Say when the settings make the particles run away."""

    def _agree_on_seed(self, device: torch.device) -> int:
        if self._seed is not None:
            return self._seed
        return int(self.ranks.agree(torch.randint(2**62, ()).to(device)))

    def _make_generator(self, swarm: dict[str, Any], device: torch.device) -> torch.Generator:
        generator = torch.Generator(device)
        stream, streams = self.ranks.stream
        saved = swarm["generators"]
        if len(saved) == streams and len(saved[stream]) == len(generator.get_state()):
            return generator.set_state(saved[stream].cpu().clone())  # a view crashes it
        return generator.manual_seed((swarm["seed"] + (len(saved) * 1000 + stream) * _RANK_STRIDE) % 2**63)

    @property
    def particles_sharded(self) -> bool:
        """Whether this rank holds a part of the particles, so that all ranks must evaluate them on the same data."""
        return self.ranks.own_particles

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, with the generators.

        With DTensor parameters a collective call, and the state is by parameter, in DTensors placed like these:
        ``torch.distributed.checkpoint`` saves and loads it.

        Raises:
            RuntimeError: the particles are sharded and :meth:`consolidate_state_dict` was not called since the last
                step.
        """
        result = super().state_dict()
        if "swarm" in self.state:
            if self.particles_sharded and self._consolidated is None:
                raise RuntimeError(
                    "the particles are sharded: call consolidate_state_dict() on every rank, then state_dict() on one"
                )
            swarm = self._consolidated or self._with_generator()
            result["state"] = {"swarm": swarm}
            if self.ranks.own_coordinates:
                swarm["generators"] = torch.stack(
                    self.ranks.gather(swarm["generators"][0].to(swarm["best_loss"].device))
                )
                states = by_parameter(swarm, self.layout.params, (*self._by_particle, *self._by_run))
                result["state"] = dict(zip(self.layout.positions, states, strict=True))
        return result

    @torch.no_grad()
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather sharded particles on rank ``to``; a collective call, which Lightning makes before it saves."""
        if not (self.particles_sharded and "swarm" in self.state):
            return
        mine = {
            key: value.cpu() if isinstance(value, Tensor) else value for key, value in self._with_generator().items()
        }
        parts: list[Any] | None = None
        if self.ranks.rank == to:
            parts = [None] * self.ranks.size
        dist.gather_object(mine, parts, group=self.ranks.group, group_dst=to)
        if parts is None:
            return
        losses, which = torch.stack([part["best_loss"] for part in parts]).min(0)
        points = torch.stack([part["best"] for part in parts])
        self._consolidated = {
            **mine,
            **{
                key: torch.cat([part[key] for part in parts], 1)
                for key in (*self._by_particle, *self._losses_by_particle)
            },
            "best": points.take_along_dim(which[None, :, None], 0)[0],
            "best_loss": losses,
            "generators": [part["generators"][0] for part in parts],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; tensors are copied. With ``shard="particles"`` each rank keeps its own particles.

        On another number of ranks or kind of device than it was saved on, the noise of the following steps is another.

        Raises:
            ValueError: the parameters are DTensors and the state is of ones that are not.
        """
        check_own_state(self, state_dict, self._state_names())
        super().load_state_dict({**state_dict, "state": {}})
        self.defaults.update({key: self.param_groups[0][key] for key in self._shared})
        self.state.clear()
        self._generator = None
        self._forget()
        saved = state_dict["state"]
        if "swarm" in saved:
            if self.ranks.own_coordinates:
                raise ValueError(
                    "state_dict is of parameters that are not DTensors, and cannot go on with FSDP2; load it without"
                )
            swarm = {k: v.clone() if isinstance(v, Tensor) else v for k, v in saved["swarm"].items()}
            if self.particles_sharded:
                rank, rows = self.ranks.rank, self.ranks.local(self.num_particles)
                for key in (*self._by_particle, *self._losses_by_particle):
                    swarm[key] = swarm[key][:, rank * rows : (rank + 1) * rows].clone()
            self.state["swarm"] = swarm
        elif saved:
            keys = [key for group in state_dict["param_groups"] for key in group["params"]]
            states = [saved[keys[i]] for i in self.layout.positions]
            self.state["swarm"] = by_column(states, self.layout.params, (*self._by_particle, *self._by_run))

    def _state_names(self) -> set[str]:
        common = {"seed", "generators", "best_loss", "leader", "steps"}
        return common.union(self._by_particle, self._losses_by_particle, self._by_run)

    def __getstate__(self) -> dict[str, Any]:
        if "swarm" in self.state:
            self.state["swarm"] = self._with_generator()
        return {**super().__getstate__(), "_seed": self._seed, "ranks": dataclasses.replace(self.ranks, group=None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._generator = None
        self._forget()

    def _with_generator(self) -> dict[str, Any]:
        swarm = self._prepare()
        assert self._generator is not None
        return {**swarm, "generators": [self._generator.get_state()]}
