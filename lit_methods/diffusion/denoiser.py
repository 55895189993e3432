"""A network together with what its output means: then every other prediction follows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_methods.diffusion.conditioning import Conditioning
from lit_methods.diffusion.predictions import check_output, check_prediction, clean, convert, point_at, scale
from lit_methods.diffusion.processes import Point, Process, as_process, per_sample

PRECONDITIONS = ("none", "scale", "edm")


class Denoiser(nn.Module):
    """``net(x, t, cond)`` with the path it was trained on and the kind of its prediction.

    Methods named after a prediction give it whatever the network predicts itself. It samples by
    :func:`~lit_methods.diffusion.sample` and is trained by :class:`~lit_methods.diffusion.Diffusion`.

    Example:
        >>> denoiser = Denoiser(lambda x, t: x / (1 + t[:, None] ** 2), process="edm", prediction="x0")
        >>> images = sample(denoiser, shape=(16, 2), steps=18, solver="heun")

    Args:
        net: a module or function of ``(x, t)``, or ``(x, t, cond)`` where there is a condition: noisy samples ``(batch,
            ...)``, times ``(batch,)``, conditions; gives a prediction shaped like ``x``.
        process: the path, an object or one of ``vp_linear vp_cosine sub_vp ve edm fm trigflow``.
        prediction: what the network predicts: ``x0 epsilon score flow v_prediction edm``.
        precondition: what the network sees. ``"none"``: ``x`` and ``t``. ``"scale"``: ``x`` divided by its standard
            deviation. ``"edm"``: besides, ``log(sigma / alpha) / 4``, limited to [-5, 5], instead of ``t`` (Karras et
            al. 2022, who use it with the prediction ``edm``).
        sigma_data: standard deviation of the data, > 0; matters for ``edm`` and its weights only.
        conditioning: the kind of condition and its null value; ``None`` passes any ``cond`` on unchecked.
        clip_x0: smallest and largest value of a clean sample when sampling; ``None`` does not clip.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        net: nn.Module | Callable[..., Tensor],
        process: str | Process = "fm",
        prediction: str = "flow",
        precondition: str = "none",
        sigma_data: float = 0.5,
        conditioning: Conditioning | None = None,
        clip_x0: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if precondition not in PRECONDITIONS:
            raise ValueError(f"precondition must be one of {list(PRECONDITIONS)}, got {precondition!r}")
        if not 0 < sigma_data < float("inf"):
            raise ValueError(f"sigma_data must be > 0, got {sigma_data}")
        if clip_x0 is not None and not -float("inf") < clip_x0[0] < clip_x0[1] < float("inf"):
            raise ValueError(f"clip_x0 must be two rising, finite numbers, got {clip_x0}")
        self.net = net
        self.process = as_process(process)
        self.prediction = check_prediction("prediction", prediction)
        self.precondition = precondition
        self.sigma_data = sigma_data
        self.conditioning = conditioning
        self.clip_x0 = clip_x0

    def forward(self, x: Tensor, t: Tensor | float, cond: Any = None, s: Tensor | None = None) -> Tensor:
        """The network's own prediction.

        Args:
            x: noisy samples ``(batch, ...)``.
            t: their times, ``(batch,)`` or a single one.
            cond: what the network is told, if anything.
            s: second times ``(batch,)`` of the network of a flow map.

        Raises:
            ValueError: shapes that do not fit, a wrong condition, or an output that is not shaped like ``x``.
        """
        if not isinstance(t, Tensor):
            t = torch.full(x.shape[:1], t, device=x.device, dtype=_time_dtype(x))
        elif t.ndim == 0:
            t = t.expand(x.shape[:1])
        if cond is not None and self.conditioning is not None:
            self.conditioning.check(cond)
        given = x
        if self.precondition != "none":
            given = x / per_sample(scale(self.process.at(t), self.sigma_data), x)
        if self.precondition == "edm":
            t, s = self._noise_level(t), None if s is None else self._noise_level(s)
        dtype = self._net_dtype()
        given = given if dtype is None else given.to(dtype)
        more = {} if s is None else {"s": s}
        out = self.net(given, t, **more) if cond is None else self.net(given, t, cond, **more)
        check_output(out, x)
        return out

    def predict(
        self, x: Tensor, t: Tensor | float, cond: Any = None, kind: str = "x0", s: Tensor | None = None
    ) -> Tensor:
        """A prediction of any kind, in at least float32; arguments as in :meth:`forward`."""
        return convert(self(x, t, cond, s), x, t, self.prediction, kind, self.process, self.sigma_data)

    def x0(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """The expected clean sample."""
        return self.predict(x, t, cond, "x0")

    def eps(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """The expected noise."""
        return self.predict(x, t, cond, "epsilon")

    def score(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """The gradient of the log-density at time ``t``."""
        return self.predict(x, t, cond, "score")

    def flow(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """The velocity ``dx/dt`` of the probability-flow ODE."""
        return self.predict(x, t, cond, "flow")

    def clean(self, out: Tensor, x: Tensor, t: Tensor | float, point: Point | None = None) -> Tensor:
        """The clean sample of an output of :meth:`forward`, clipped if this denoiser clips.

        Args:
            out: the output.
            x: what it was made for.
            t: its times.
            point: where the process is then, if known.
        """
        x0 = clean(out, x, self.prediction, point or point_at(self.process, t, x), self.sigma_data)
        return x0 if self.clip_x0 is None else x0.clamp(*self.clip_x0)

    @property
    def feature_layers(self) -> list[str]:
        """Layers whose outputs describe a sample, as the network names them itself in ``feature_layers``."""
        return list(getattr(self.net, "feature_layers", ()))

    @property
    def sample_shape(self) -> list[int] | None:
        """Shape of one sample, if the network tells it in ``sample_shape``."""
        shape = getattr(self.net, "sample_shape", None)
        return None if shape is None else list(shape)

    def features(
        self, x: Tensor, t: Tensor | float, layers: Sequence[str] | None = None, cond: Any = None
    ) -> list[Tensor]:
        """Outputs of named layers of the network, which runs no further than the last of them.

        Args:
            x: noisy samples ``(batch, ...)``.
            t: their times.
            layers: names as in ``net.named_modules()``, in the order in which they run; ``None``: those that the
                network itself names in ``feature_layers``, as ours and those of diffusers do.
            cond: what the network is told, if anything.

        Raises:
            AttributeError: the network has no such layer.
            ValueError: a layer did not run, an empty list, or ``None`` for a network that names none.
        """
        return self._run_and_tap(x, t, layers, cond, whole=False)[1]

    def with_features(
        self, x: Tensor, t: Tensor | float, layers: Sequence[str] | None = None, cond: Any = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The network's own prediction and, of the same call, the outputs of layers; arguments as in :meth:`features`.

        Raises:
            AttributeError: the network has no such layer.
            ValueError: a layer did not run, an empty list, or ``None`` for a network that names none.
        """
        out, found = self._run_and_tap(x, t, layers, cond, whole=True)
        assert out is not None
        return out, found

    def _run_and_tap(
        self, x: Tensor, t: Tensor | float, layers: Sequence[str] | None, cond: Any, whole: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        layers = self.feature_layers if layers is None else layers
        if not layers:
            raise ValueError(
                "layers must name at least one layer, got none; None needs a network with feature_layers, and "
                f"{type(self.net).__name__} has none"
            )
        found: dict[str, Tensor] = {}

        def keep(name: str, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output
            if len(found) == len(layers) and not whole:
                raise _Enough

        assert isinstance(self.net, nn.Module)
        hooks = [
            self.net.get_submodule(name).register_forward_hook(lambda m, i, output, name=name: keep(name, output))
            for name in layers
        ]
        out = None
        try:
            out = self(x, t, cond)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if missing := [name for name in layers if name not in found]:
            raise ValueError(f"layers must name layers that run, got {missing} which did not")
        return out, [found[name] for name in layers]

    def under(self, process: str | Process) -> "Denoiser":
        """The same model for samples that follow another path.

        A path ``x / norm`` depends on ``sigma / alpha`` only; so one model serves all paths. Where the other path is
        noisier than anything this model was trained on, it is asked at its own noisiest time.
        """
        process = as_process(process)
        if process == self.process:
            return self
        return Denoiser(
            _Rescaled(self, process), process, "x0", conditioning=self.conditioning, sigma_data=self.sigma_data
        )

    def _net_dtype(self) -> torch.dtype | None:
        """What the network computes in; samples may have more precision than it."""
        parameters = self.net.parameters() if isinstance(self.net, nn.Module) else iter(())
        return next((p.dtype for p in parameters if p.is_floating_point()), None)

    def _noise_level(self, t: Tensor) -> Tensor:
        return (-0.25 * self.process.lam(t)).clamp(-5, 5)


class _Rescaled(nn.Module):
    """A denoiser's clean sample for samples of another process."""

    def __init__(self, denoiser: Denoiser, process: Process) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process = process

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        own = self.denoiser.process
        s = own.t_from_lam(self.process.lam(t)).clamp(max=own.t_max)
        factor = scale(own.at(s), 1.0) / scale(self.process.at(t), 1.0)
        x = per_sample(factor, x).to(x.dtype) * x
        return self.denoiser.clean(self.denoiser(x, s, cond), x, s)


class _Enough(Exception):
    """Stops a forward pass when all features are there."""


def _time_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
