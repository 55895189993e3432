"""What the gradient-free particle optimizers share: evaluation, the consensus point, several ranks and checkpoints."""

import inspect
import math
from collections.abc import Callable
from itertools import accumulate, pairwise
from types import FunctionType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from lit_methods.optim.flat_parameters import is_dtensor

Particles = dict[str, Tensor]
Losses = Callable[[Particles], Tensor]
Evaluate = Callable[[Tensor], Tensor]
_RANK_STRIDE = 0x9E3779B97F4A7C15  # apart from one another for any seed


def consensus_weights(losses: Tensor, alpha: float | Tensor, lowest: Tensor | None = None) -> Tensor:
    """``softmax(-alpha losses)``; NaN when no loss is finite.

    Any ``alpha`` from 0 (equal weights) to infinity (the best particle) is exact: the lowest loss is subtracted first.

    Args:
        losses: ``(n,)``, float32 or float64; infinite ones have weight 0.
        alpha: inverse temperature, >= 0; a tensor must be > 0 and finite.
        lowest: the lowest loss, where it is known.
    """
    if not isinstance(alpha, Tensor):
        limits = torch.finfo(losses.dtype)
        alpha = min(max(alpha, limits.tiny), limits.max)  # 0 and infinity times infinite losses would be NaN
    return (losses - (losses.amin() if lowest is None else lowest)).mul_(-alpha).softmax(0)


def alpha_for_sample_size(losses: Tensor, share: float, steps: int = 40) -> Tensor:
    """The alpha in [1e-5, 1e15] whose weights have the effective sample size ``share * n``, by bisection of log alpha.

    The effective sample size ``(sum w)^2 / sum w^2`` falls from n to 1 as alpha grows. No host synchronisation.
    """
    low, high = (losses.new_full((), math.log(bound)) for bound in (1e-5, 1e15))
    for _ in range(steps):
        middle = (low + high) / 2
        too_even = 1 / consensus_weights(losses, middle.exp()).square().sum() > share * len(losses)
        low, high = torch.where(too_even, middle, low), torch.where(too_even, high, middle)
    return ((low + high) / 2).exp()


class ParticleOptimizer(Optimizer):
    """Keeps N particles, each a value of all parameters, in one ``(N, d)`` buffer; subclasses say how they move.

    The buffer is float32, or float64 where any parameter is. Parameters that do not require gradients are left alone.
    """

    state: dict[Any, Any]  # type: ignore[assignment]  # the swarm is no one parameter's: it has the key "swarm"
    _shared: tuple[str, ...] = ("num_particles", "alpha", "effective_sample_size")
    _cached_layout: list[tuple[str, nn.Parameter, int]] | None
    _cached_columns: list[tuple[dict[str, Any], slice]] | None
    _last_views: tuple[Tensor, Particles] | None
    _buffers: dict[tuple[str, int, int], Tensor]
    _generator: torch.Generator | None
    _ready: bool
    _consolidated: dict[str, Any] | None
    _seen: list[tuple[Tensor, Tensor, Tensor]]  # this rank's and all ranks' lowest loss, and its particle, by batch
    _lowest: float  # loss of this step
    _change: float  # how far the consensus moved last, in the coordinate that moved most

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
        self._seed, self._shard, self._group = seed, shard, process_group
        self._generator = None
        self._forget()
        super().__init__(params.named_parameters() if isinstance(params, nn.Module) else params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: each particle gets further coordinates, drawn like those at the start."""
        for key in self._shared:
            if param_group.get(key, self.defaults[key]) != self.defaults[key]:
                raise ValueError(f"{key} is shared by all parameter groups, got {param_group[key]!r} for one of them")
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            for p in self.param_groups[-1]["params"]:
                if not p.is_floating_point():
                    raise ValueError(f"params must be real floating point, got {p.dtype}; view complex ones as real")
                if is_dtensor(p):
                    raise ValueError("params must not be DTensors: FSDP2 and tensor parallelism are not supported")
        except ValueError:
            self.param_groups.pop()
            raise
        self._forget()

    @property
    def particles(self) -> Particles:
        """Parameter name (or position, where there are no names) -> ``(N, *shape)``, views of this rank's particles."""
        return self._by_name(self._prepare()["particles"])

    def consensus(self) -> Particles:
        """Parameter name -> the last consensus point, which is also what the parameters hold (up to their dtype)."""
        return self._one(self._prepare()["consensus"])

    def best_particle(self) -> Particles:
        """Parameter name -> the particle with the lowest loss so far; NaN before the first step.

        On changing data batches the lowest loss says little. With ``shard="particles"`` a collective call.
        """
        swarm = self._prepare()
        best = swarm["best"]
        if self.particles_sharded:
            losses = self._all_gather(best.new_tensor([swarm["best_loss"]]))
            points = self._all_gather(best[None])
            best = points[losses.argmin()]
        return self._one(best)

    @torch.no_grad()
    def variance(self) -> Tensor:
        """Variance of the particles in each coordinate, ``(d,)``; with ``shard="particles"`` a collective call."""
        particles = self._prepare()["particles"]
        mean = self._sum(particles.sum(0)) / self.num_particles
        return self._sum((particles - mean).square().sum(0)) / self.num_particles

    @property
    def num_particles(self) -> int:
        """N, on all ranks together."""
        return self.param_groups[0]["num_particles"]

    def step(self, closure: Callable[..., Any] | None = None) -> Any:
        """Evaluate particles, move them, and write the consensus point into the parameters.

        Args:
            closure: one of

                - ``closure(particles) -> losses``: a dict of ``(n, *shape)`` tensors (views: neither keep nor change
                  them) to ``(n,)`` losses; see :func:`~lit_methods.optim.particle_losses`;
                - ``closure() -> such a function``, for wrappers that pass no arguments (Lightning's);
                - ``closure() -> loss`` of the parameters' present values, as other optimizers take it. It is called
                  once for the present values and once more for every evaluated particle: the slow way.

        Returns:
            The lowest loss of this step; with the third kind of closure the loss at the present values. ``None`` if
            the closure returns ``None``.

        Raises:
            ValueError: losses of the wrong shape.
            RuntimeError: no closure; no loss is finite; or the particles have diverged.
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
        if not _needs_argument(closure):
            with torch.enable_grad():
                loss = losses_of = closure()
            if loss is None:
                return None
        evaluate = self._one_by_one(closure) if not callable(losses_of) else self._batched(losses_of)
        self._consolidated, self._seen = None, []
        self._advance(swarm, evaluate)
        self._write(swarm["consensus"])
        return self._lowest if callable(losses_of) else loss

    def _advance(self, swarm: dict[str, Any], evaluate: Evaluate) -> None:
        """Move the particles and the consensus point."""
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "alpha"):
            if not group[name] >= 0:
                raise ValueError(f"{name} must be >= 0, got {group[name]}")
        share = group["effective_sample_size"]
        if share is not None and not 0 < share < 1:
            raise ValueError(f"effective_sample_size must be in (0, 1), or None, got {share}")

    def _find_consensus(self, swarm: dict[str, Any], points: Tensor, losses: Tensor, last: bool = True) -> Tensor:
        """The consensus point of ``points`` (n, d), identical on all ranks; where no loss is finite, the previous one.

        ``last`` says that no other particle batch follows in this step: it is then that the host learns how the step
        went, before the particles move.
        """
        losses = self._mean_over_data(losses).nan_to_num(math.inf, math.inf, math.inf)
        mine, own = losses, losses.amin()
        lowest = own
        if self.particles_sharded:
            losses = self._all_gather(losses)
            lowest = losses.amin()
        share, alpha = self.param_groups[0]["effective_sample_size"], self.param_groups[0]["alpha"]
        if share is not None:
            alpha = alpha_for_sample_size(losses, share)
        weights = consensus_weights(losses, alpha, lowest)
        if self.particles_sharded:
            weights = weights.tensor_split(dist.get_world_size(self._group))[dist.get_rank(self._group)]
        # `out=` keeps autocast away from this product.
        point = self._sum(torch.mv(points.T, weights, out=torch.empty_like(swarm["consensus"])))
        for group, columns in self._columns():
            if group["lr"] == 0:
                point[columns] = swarm["consensus"][columns]
        if last:
            self._end_step(swarm, points, mine, (own, lowest), point)
        else:
            self._seen.append((own, lowest, _row(points, mine.argmin())))
            swarm["previous"] = swarm["consensus"]
            swarm["consensus"] = torch.where(lowest < math.inf, point, swarm["consensus"])
        return swarm["consensus"]

    def _end_step(
        self, swarm: dict[str, Any], points: Tensor, losses: Tensor, lows: tuple[Tensor, Tensor], point: Tensor
    ) -> None:
        """Learn the lowest losses and how far the consensus moves (the one host synchronisation); keep the best."""
        change = torch.linalg.vector_norm(point - swarm["consensus"], math.inf)
        found = [*(x for own, lowest, _ in self._seen for x in (own, lowest)), *lows, change]
        *numbers, self._change = torch.stack(found).tolist()
        own, lowest = numbers[::2], numbers[1::2]
        self._lowest = min(lowest)
        if self._lowest == math.inf:
            raise RuntimeError("no particle has a finite loss; check the loss, or start with a smaller spread")
        if min(own) < swarm["best_loss"]:
            swarm["best_loss"] = min(own)
            which = own.index(min(own))
            swarm["best"] = self._seen[which][2] if which < len(self._seen) else _row(points, losses.argmin())
        swarm["previous"] = swarm["consensus"]
        if lowest[-1] < math.inf:
            if not math.isfinite(self._change):
                raise RuntimeError("the particles have diverged; use a smaller sigma or lr")
            swarm["consensus"] = point

    def _batched(self, losses_of: Losses) -> Evaluate:
        def evaluate(points: Tensor) -> Tensor:
            losses = losses_of(self._views(points))
            if not isinstance(losses, Tensor) or losses.shape != points.shape[:1]:
                got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                raise ValueError(f"the closure must return one loss per particle, shape ({len(points)},), got {got}")
            return losses.to(points.dtype, copy=self._distributed)

        return evaluate

    def _one_by_one(self, closure: Callable[[], Any]) -> Evaluate:
        def evaluate(points: Tensor) -> Tensor:
            losses = []
            for point in points.detach():
                with torch.no_grad():
                    self._write(point)
                with torch.enable_grad():
                    losses.append(torch.as_tensor(closure(), device=points.device).detach().to(points.dtype))
            return torch.stack(losses)

        return evaluate

    def _write(self, point: Tensor) -> None:
        torch._foreach_copy_([p for _, p, _ in self._layout], list(self._one(point).values()))

    def _views(self, points: Tensor) -> Particles:
        """Views by name, kept because the same buffer comes again."""
        if self._last_views is None or self._last_views[0] is not points:
            self._last_views = (points, self._by_name(points))
        return self._last_views[1]

    def _by_name(self, points: Tensor) -> Particles:
        parts = points.split([size for _, _, size in self._layout], 1)
        return {name: part.view(len(points), *p.shape) for (name, p, _), part in zip(self._layout, parts, strict=True)}

    def _one(self, point: Tensor) -> Particles:
        parts = point.split([size for _, _, size in self._layout])
        return {name: part.view(p.shape) for (name, p, _), part in zip(self._layout, parts, strict=True)}

    def _buffer(self, name: str, rows: int, columns: int) -> Tensor:
        """Scratch memory ``(rows, columns)``, the same tensor while the size stays the same."""
        key = (name, rows, columns)
        if key not in self._buffers:
            self._buffers[key] = self.state["swarm"]["particles"].new_empty(rows, columns)
        return self._buffers[key]

    def _fill_normal(self, x: Tensor, mean: float, std: float) -> None:
        """Fill with normal numbers; this is where all noise comes from."""
        x.normal_(mean, std, generator=self._generator)

    def _mean_over_data(self, x: Tensor) -> Tensor:
        """Mean over ranks that see different data, in place."""
        if self._distributed and self._shard == "data":
            dist.all_reduce(x, group=self._group)
            x.div_(dist.get_world_size(self._group))
        return x

    def _set_shared(self, name: str, value: Any) -> None:
        self.defaults[name] = value
        for group in self.param_groups:
            group[name] = value

    @property
    def _layout(self) -> list[tuple[str, nn.Parameter, int]]:
        """Name, parameter and number of coordinates of everything that is trained, in the buffer's order."""
        if self._cached_layout is None:
            params = [p for group in self.param_groups for p in group["params"]]
            given = [name for group in self.param_groups for name in group.get("param_names", ())]
            names = given or [str(i) for i in range(len(params))]
            self._cached_layout = [(n, p, p.numel()) for n, p in zip(names, params, strict=True) if p.requires_grad]
            if not self._cached_layout:
                raise ValueError("params holds nothing to train: no parameter requires gradients")
        return self._cached_layout

    def _columns(self) -> list[tuple[dict[str, Any], slice]]:
        """Every group with its columns of the buffer."""
        if self._cached_columns is None:
            sizes = [sum(p.numel() for p in g["params"] if p.requires_grad) for g in self.param_groups]
            bounds = [0, *accumulate(sizes)]
            self._cached_columns = [
                (group, slice(*ends)) for group, ends in zip(self.param_groups, pairwise(bounds), strict=True)
            ]
        return self._cached_columns

    def _forget(self) -> None:
        """Drop what is derived from groups and state."""
        self._cached_layout = self._cached_columns = self._last_views = self._consolidated = None
        self._buffers = {}
        self._ready = False

    def _prepare(self) -> dict[str, Any]:
        """The swarm and its generator: made at the first use, brought up to date after anything that may move them."""
        device = self._layout[0][1].device
        if self._ready and self._generator is not None and self._generator.device == device:
            return self.state["swarm"]
        double = any(p.dtype == torch.float64 for _, p, _ in self._layout)
        dtype = torch.float64 if double else torch.float32
        swarm = self.state.setdefault("swarm", {})
        if "seed" not in swarm:
            swarm["seed"] = self._agree_on_seed(device)
            swarm["generators"] = []
        for key in ("particles", "consensus", "previous", "best"):
            if key in swarm:
                swarm[key] = swarm[key].to(device, dtype)
        if self._generator is None or self._generator.device != device:
            self._generator = self._make_generator(swarm, device)
        current = torch.cat([p.detach().flatten().to(dtype) for _, p, _ in self._layout])
        rows = self._local(self.num_particles)
        if "particles" not in swarm:
            swarm["particles"] = self._initial(current, rows)
            swarm["consensus"] = current
            swarm["previous"] = current.clone()
            swarm["best"] = torch.full_like(current, math.nan)
            swarm["best_loss"] = math.inf
            self._warn_of_divergence(len(current))
        elif (known := swarm["particles"].shape[1]) < len(current):  # a parameter group was added
            more = current[known:]
            swarm["particles"] = torch.cat([swarm["particles"], self._initial(more, rows)], 1)
            for key in ("consensus", "previous", "best"):
                swarm[key] = torch.cat([swarm[key], more])
        elif known > len(current):
            raise ValueError(f"the particles have {known} coordinates, the trainable parameters {len(current)}")
        self._ready = True
        return swarm

    def _initial(self, current: Tensor, rows: int) -> Tensor:
        """New particles ``(rows, d)``."""
        raise NotImplementedError

    def _warn_of_divergence(self, dim: int) -> None:
        """Say when the settings make the particles run away."""

    def _agree_on_seed(self, device: torch.device) -> int:
        if self._seed is not None:
            return self._seed
        seed = torch.randint(2**62, ()).to(device)
        if self._distributed:
            dist.broadcast(seed, group_src=0, group=self._group)
        return int(seed)

    def _make_generator(self, swarm: dict[str, Any], device: torch.device) -> torch.Generator:
        generator = torch.Generator(device)
        stream, streams = 0, 1
        if self.particles_sharded:
            stream, streams = dist.get_rank(self._group), dist.get_world_size(self._group)
        saved = swarm["generators"]
        if len(saved) == streams and len(saved[stream]) == len(generator.get_state()):
            return generator.set_state(saved[stream].cpu())
        return generator.manual_seed((swarm["seed"] + (len(saved) * 1000 + stream) * _RANK_STRIDE) % 2**63)

    # --- several processes --------------------------------------------------------------------------------------------

    @property
    def _distributed(self) -> bool:
        ready = dist.is_available() and dist.is_initialized()
        return ready and dist.get_world_size(self._group) > 1

    @property
    def particles_sharded(self) -> bool:
        """Whether this rank holds a part of the particles, so that all ranks must evaluate them on the same data."""
        return self._shard == "particles" and self._distributed

    def _local(self, number: int) -> int:
        """This rank's share of a number of particles."""
        if not self.particles_sharded:
            return number
        ranks = dist.get_world_size(self._group)
        if number % ranks:
            raise ValueError(
                f"num_particles and particle_batch_size must be multiples of the {ranks} ranks, got {number}"
            )
        return number // ranks

    def _sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks' particles, in place."""
        if self.particles_sharded:
            dist.all_reduce(x, group=self._group)
        return x

    def _all_gather(self, x: Tensor) -> Tensor:
        result = x.new_empty(dist.get_world_size(self._group) * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(result, x.contiguous(), group=self._group)
        return result

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, with the generators.

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
            result["state"] = {"swarm": self._consolidated or self._with_generator()}
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
        if dist.get_rank(self._group) == to:
            parts = [None] * dist.get_world_size(self._group)
        dist.gather_object(mine, parts, group=self._group, group_dst=to)
        if parts is None:
            return
        best = min(parts, key=lambda part: part["best_loss"])
        self._consolidated = {
            **mine,
            "particles": torch.cat([part["particles"] for part in parts]),
            "best": best["best"],
            "best_loss": best["best_loss"],
            "generators": [part["generators"][0] for part in parts],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; tensors are copied. With ``shard="particles"`` each rank keeps its own particles.

        On another number of ranks or kind of device than it was saved on, the noise of the following steps is another.
        """
        super().load_state_dict({**state_dict, "state": {}})
        self.defaults.update({key: self.param_groups[0][key] for key in self._shared})
        self.state.clear()
        self._generator = None
        self._forget()
        if "swarm" in state_dict["state"]:
            swarm = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state_dict["state"]["swarm"].items()}
            if self.particles_sharded:
                rank, rows = dist.get_rank(self._group), self._local(self.num_particles)
                swarm["particles"] = swarm["particles"][rank * rows : (rank + 1) * rows].clone()
            self.state["swarm"] = swarm

    def __getstate__(self) -> dict[str, Any]:
        if "swarm" in self.state:
            self.state["swarm"] = self._with_generator()
        kept = {name: getattr(self, name) for name in ("_seed", "_shard")}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_group", None)
        self._generator = None
        self._forget()

    def _with_generator(self) -> dict[str, Any]:
        swarm = self._prepare()
        assert self._generator is not None
        return {**swarm, "generators": [self._generator.get_state()]}


def _row(points: Tensor, index: Tensor) -> Tensor:
    """A copy of row ``index`` (a scalar tensor), without a host synchronisation."""
    return points.index_select(0, index.view(1))[0]


def _needs_argument(closure: Callable[..., Any]) -> bool:
    if isinstance(closure, FunctionType):  # the usual case, without the time that a signature takes
        return closure.__code__.co_argcount > len(closure.__defaults__ or ())
    try:
        inspect.signature(closure).bind()
    except TypeError:
        return True
    return False
