"""Models of Hugging Face's diffusers as our denoisers, and ours as their pipelines (extra: ``diffusion``).

diffusers counts time in steps, 0 ... 999, ours is continuous; its networks have embeddings for its range. The adapters
here translate: a network that was trained there sees the numbers it knows, one that is trained here a range for which
its embedding was built.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_methods.diffusion.conditioning import Labels
from lit_methods.diffusion.denoiser import Denoiser
from lit_methods.diffusion.processes import EDM, FlowMatching, Point, Process

_PREDICTIONS = {
    "epsilon": "epsilon",
    "sample": "x0",
    "v_prediction": "v_prediction",
    "flow_prediction": "flow",
}


class UNet2D(nn.Module):
    """A ``UNet2DModel`` of diffusers as ``net(x, t)``, ``net(x, t, labels)`` or ``net(x, t, s=s)``.

    Images whose sides the network cannot halve often enough are padded with zeros, and its output is cropped.

    Args:
        model: the network, or the arguments of ``diffusers.UNet2DModel``. Labels need ``num_class_embeds`` with one
            more than there are classes, second times ``class_embed_type: timestep``.
        time_scale: what times are multiplied by, > 0: 1000 for times in [0, 1]; 1 for flow maps, whose derivative in
            time it would multiply.
        time_offset: what is added then.

    Raises:
        ValueError: an argument out of range, or a label and a second time together.
        ImportError: diffusers is missing.
    """

    def __init__(self, model: Any, time_scale: float = 1000.0, time_offset: float = 0.0) -> None:
        super().__init__()
        _check_times(time_scale, time_offset)
        self.model = _diffusers().UNet2DModel(**model) if isinstance(model, dict) else model
        self.time_scale = time_scale
        self.time_offset = time_offset
        self.multiple = 2 ** (len(self.model.config.block_out_channels) - 1)
        self.feature_layers = ["model.mid_block"]

    @property
    def sample_shape(self) -> list[int] | None:
        """Channels, height and width of the network's images, if it was built for a size."""
        return _sample_shape(self.model.config)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None) -> Tensor:
        """A prediction shaped like ``x``, ``(batch, channels, height, width)``."""
        if cond is not None and s is not None:
            raise ValueError("UNet2DModel takes labels or a second time, not both")
        told = cond if s is None else (t - s) * self.time_scale
        height, width = x.shape[-2:]
        padded = nn.functional.pad(x, (0, -width % self.multiple, 0, -height % self.multiple))
        out = self.model(padded, t * self.time_scale + self.time_offset, class_labels=told).sample
        return out[..., :height, :width]


class DiT(nn.Module):
    """A ``DiTTransformer2DModel`` of diffusers as ``net(x, t, labels)``.

    Its own dropping of labels is switched off: a conditioning of ours does it, and twice would be too often.

    Args:
        model: the network, or the arguments of ``diffusers.DiTTransformer2DModel``.
        time_scale: what times are multiplied by, > 0: 1000 for times in [0, 1]; 1 for flow maps.
        time_offset: what is added then.

    Raises:
        ValueError: an argument out of range, or no labels.
        ImportError: diffusers is missing.
    """

    def __init__(self, model: Any, time_scale: float = 1000.0, time_offset: float = 0.0) -> None:
        super().__init__()
        _check_times(time_scale, time_offset)
        self.model = _diffusers().DiTTransformer2DModel(**model) if isinstance(model, dict) else model
        self.time_scale = time_scale
        self.time_offset = time_offset
        for module in self.model.modules():
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        self.feature_layers = [f"model.transformer_blocks.{self.model.config.num_layers // 2}"]

    @property
    def sample_shape(self) -> list[int] | None:
        """Channels, height and width of the network's samples."""
        return _sample_shape(self.model.config)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """A prediction shaped like ``x``; the part of the output that predicts a variance is left out."""
        if cond is None:
            raise ValueError("DiTTransformer2DModel needs labels: give the model a conditioning")
        out = self.model(x, timestep=t * self.time_scale + self.time_offset, class_labels=cond).sample
        return out[:, : x.shape[1]]


class UNet2DCondition(nn.Module):
    """A ``UNet2DConditionModel`` of diffusers, as in Stable Diffusion, as ``net(x, t, sequences)``.

    Args:
        model: the network, or the arguments of ``diffusers.UNet2DConditionModel``.
        time_scale: what times are multiplied by, > 0.
        time_offset: what is added then; -1 for models that were trained in diffusers' steps.

    Raises:
        ValueError: an argument out of range, or no sequences.
        ImportError: diffusers is missing.
    """

    def __init__(self, model: Any, time_scale: float = 1000.0, time_offset: float = -1.0) -> None:
        super().__init__()
        _check_times(time_scale, time_offset)
        self.model = _diffusers().UNet2DConditionModel(**model) if isinstance(model, dict) else model
        self.time_scale = time_scale
        self.time_offset = time_offset
        self.feature_layers = ["model.mid_block"]

    @property
    def sample_shape(self) -> list[int] | None:
        """Channels, height and width of the network's samples, if it was built for a size."""
        return _sample_shape(self.model.config)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """A prediction shaped like ``x``, ``(batch, channels, height, width)``."""
        if cond is None:
            raise ValueError("UNet2DConditionModel needs sequences: give the model a conditioning")
        return self.model(x, t * self.time_scale + self.time_offset, encoder_hidden_states=cond.to(x.dtype)).sample


@dataclass(frozen=True)
class DiscreteVP(Process):
    """Variance-preserving diffusion with a table of alphas, as trained in discrete steps.

    Step ``k`` of ``n`` is at ``t = (k + 1) / n``; between the steps ``log alpha`` is linear, and 0 at ``t = 0``.

    Args:
        alphas_cumprod: squares of alpha at the steps, falling, each in (0, 1).

    Raises:
        ValueError: other numbers.
    """

    alphas_cumprod: tuple[float, ...]
    _table: Tensor = field(init=False, repr=False, compare=False)

    t_max: ClassVar[float] = 1.0  # type: ignore[misc]

    def __post_init__(self) -> None:
        table = torch.tensor([1.0, *self.alphas_cumprod], dtype=torch.float64)
        if len(table) < 2 or not bool((table.diff() < 0).all()) or table[-1] <= 0:
            raise ValueError("alphas_cumprod must be falling numbers in (0, 1)")
        object.__setattr__(self, "_table", 0.5 * table.log())

    def __repr__(self) -> str:
        return f"DiscreteVP({len(self.alphas_cumprod)} steps)"

    @property
    def t_min(self) -> float:  # type: ignore[override]
        """The first step."""
        return 1 / len(self.alphas_cumprod)

    def at(self, t: Tensor | float) -> Point:
        """``alpha`` between the steps, ``sigma = sqrt(1 - alpha^2)``."""
        t = torch.as_tensor(t, dtype=torch.float64) if not isinstance(t, Tensor) else t
        table = self._table.to(device=t.device)
        place = t.double() * len(self.alphas_cumprod)
        below = place.floor().clamp(0, len(table) - 2).long()
        rate = table[below + 1] - table[below]
        log_alpha = table[below] + (place - below) * rate
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).clamp(min=0).sqrt()
        slope = rate * len(self.alphas_cumprod)
        dtype = torch.promote_types(t.dtype, torch.float32)
        return Point(*(v.to(dtype) for v in (alpha, sigma, alpha * slope, -(alpha**2) * slope / sigma)))

    def t_from_lam(self, lam: Tensor) -> Tensor:
        """Linear between the steps."""
        log_alpha = -0.5 * torch.nn.functional.softplus(-2 * lam.double())
        table = self._table.to(lam.device)
        above = torch.searchsorted(-table, -log_alpha).clamp(1, len(table) - 1)
        share = (log_alpha - table[above - 1]) / (table[above] - table[above - 1])
        return ((above - 1 + share) / len(self.alphas_cumprod)).to(lam.dtype)


def scaled_linear_vp(beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> DiscreteVP:
    """The process of Stable Diffusion: the roots of its betas rise linearly (diffusers' ``scaled_linear``).

    Args:
        beta_start: first beta, in (0, 1).
        beta_end: last beta, in [``beta_start``, 1).
        steps: number of betas, >= 1.

    Raises:
        ValueError: an argument out of range.
    """
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"beta_start and beta_end must be 0 < start <= end < 1, got {beta_start} and {beta_end}")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    return DiscreteVP(tuple((1 - betas).cumprod(0).tolist()))


def from_diffusers(source: Any, scheduler: Any = None) -> Denoiser:
    """A denoiser of a diffusers model, with the process and the prediction that its scheduler says.

    Args:
        source: folder of a pipeline of ``UNet2DModel`` or ``DiTTransformer2DModel``, such a pipeline, or the model.
        scheduler: the scheduler it was trained with; needed with a model, and left out otherwise.

    Raises:
        ValueError: a model or a scheduler of another kind.
        ImportError: diffusers is missing.
    """
    diffusers = _diffusers()
    if isinstance(source, str | Path):
        source = diffusers.DiffusionPipeline.from_pretrained(source)
    if isinstance(source, diffusers.DiffusionPipeline):
        scheduler = source.scheduler
        source = getattr(source, "unet", None) or getattr(source, "transformer", None)
    if scheduler is None:
        raise ValueError("scheduler must be given with a model, got None")
    adapters: dict[type, Any] = {diffusers.UNet2DModel: UNet2D, diffusers.DiTTransformer2DModel: DiT}
    adapter = next((ours for theirs, ours in adapters.items() if isinstance(source, theirs)), None)
    if adapter is None:
        raise ValueError(f"source must be a UNet2DModel or a DiTTransformer2DModel, got {type(source).__name__}")
    classes = getattr(source.config, "num_embeds_ada_norm", None)
    if adapter is UNet2D and source.config.num_class_embeds:
        classes = source.config.num_class_embeds - 1
    conditioning = None if classes is None else Labels(classes)
    config = scheduler.config
    if isinstance(scheduler, diffusers.EDMEulerScheduler):
        process: Process = EDM(config.sigma_min, config.sigma_max)
        net = adapter(source, time_scale=1.0)
        return Denoiser(net, process, "edm", "edm", config.sigma_data, conditioning)
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler) or config.get("use_flow_sigmas"):
        return Denoiser(adapter(source, config.num_train_timesteps), FlowMatching(), "flow", conditioning=conditioning)
    if not hasattr(scheduler, "alphas_cumprod") or config.get("prediction_type") not in _PREDICTIONS:
        raise ValueError(
            f"scheduler must be of DDPM's, flow matching's or EDM's family, got {type(scheduler).__name__}"
        )
    process = DiscreteVP(tuple(scheduler.alphas_cumprod.double().tolist()))
    net = adapter(source, time_scale=config.num_train_timesteps, time_offset=-1.0)
    return Denoiser(net, process, _PREDICTIONS[config.prediction_type], conditioning=conditioning)


def to_scheduler(denoiser: Denoiser) -> Any:
    """A scheduler of diffusers for the process and the prediction of a denoiser, without clipping.

    Variance-preserving processes become ``DDIMScheduler`` with a table of 1000 steps (its samples are those of our
    ``ddim`` at the same times), flow matching ``FlowMatchEulerDiscreteScheduler`` (ours: ``euler``; give it
    ``sigmas=linspace(1, 1 / n, n)``, since its own grid wastes the last step), EDM ``EDMEulerScheduler`` (``euler``).

    Raises:
        ValueError: a process or a prediction that diffusers has not.
        ImportError: diffusers is missing.
    """
    diffusers = _diffusers()
    process, prediction = denoiser.process, denoiser.prediction
    if isinstance(process, FlowMatching) and prediction == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler()
    if isinstance(process, EDM) and prediction == "edm" and denoiser.precondition == "edm":
        return diffusers.EDMEulerScheduler(
            sigma_min=process.sigma_min, sigma_max=process.sigma_max, sigma_data=denoiser.sigma_data
        )
    names = {ours: theirs for theirs, ours in _PREDICTIONS.items() if ours != "flow"}
    steps = torch.arange(1, 1001, dtype=torch.float64) / 1000 * process.t_max
    point = process.at(steps)
    if prediction not in names or not torch.allclose(point.alpha**2 + point.sigma**2, torch.ones(1).double()):
        raise ValueError(f"diffusers has no scheduler for {process} with prediction {prediction!r}")
    squares = torch.cat([torch.ones(1, dtype=torch.float64), point.alpha**2])
    betas = 1 - squares[1:] / squares[:-1]
    return diffusers.DDIMScheduler(
        trained_betas=betas.tolist(),
        prediction_type=names[prediction],
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def to_pipeline(denoiser: Denoiser, folder: str | Path) -> None:
    """Write a pipeline folder that ``diffusers.DiffusionPipeline.from_pretrained`` loads.

    Unconditional :class:`UNet2D` models of variance-preserving processes become a ``DDIMPipeline``, those of flow
    matching a ``DDPMPipeline`` with its scheduler.

    Args:
        denoiser: the model.
        folder: where to write.

    Raises:
        ValueError: a network, a condition or a process for which diffusers has no pipeline.
        ImportError: diffusers is missing.
    """
    diffusers = _diffusers()
    net = denoiser.net
    if not isinstance(net, UNet2D) or denoiser.conditioning is not None:
        raise ValueError(
            f"denoiser must have a UNet2D without conditioning to become a pipeline, got {type(net).__name__} and "
            f"{type(denoiser.conditioning).__name__}"
        )
    scheduler = to_scheduler(denoiser)
    flow = isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    if isinstance(scheduler, diffusers.EDMEulerScheduler):
        raise ValueError("diffusers has no pipeline that scales the input of a UNet2DModel as EDM needs it")
    expected = (1000.0, 0.0) if flow else (1000.0 / denoiser.process.t_max, -1.0)
    if (net.time_scale, net.time_offset) != expected:
        raise ValueError(
            f"time_scale and time_offset of UNet2D must be {expected[0]:g} and {expected[1]:g} for diffusers to call "
            f"the network at the same times, got {net.time_scale:g} and {net.time_offset:g}"
        )
    pipeline = diffusers.DDPMPipeline if flow else diffusers.DDIMPipeline
    pipeline(unet=net.model, scheduler=scheduler).save_pretrained(folder)


def to_one_step_pipeline(denoiser: Denoiser, folder: str | Path) -> None:
    """Write a generator of one step as a folder that ``diffusers.DiffusionPipeline.from_pretrained`` loads.

    Its samples are ``denoiser.x0(noise, t_max)``. :class:`UNet2D` models with EDM's process, prediction and
    preconditioning, with or without labels, become a ``ConsistencyModelPipeline``, whose default is one step; others
    what :func:`to_pipeline` makes of them, **to be called with** ``num_inference_steps=1``.

    Args:
        denoiser: the generator, such as ``FDistill.student``.
        folder: where to write.

    Raises:
        ValueError: a network, a condition or a process for which diffusers has no pipeline.
        ImportError: diffusers is missing.
    """
    diffusers = _diffusers()
    process, net = denoiser.process, denoiser.net
    if not (isinstance(process, EDM) and denoiser.prediction == denoiser.precondition == "edm"):
        to_pipeline(denoiser, folder)
        return
    if not isinstance(net, UNet2D) or not isinstance(denoiser.conditioning, Labels | None):
        raise ValueError(
            "denoiser must have a UNet2D without conditioning, or with Labels, to become a pipeline, got "
            f"{type(net).__name__} and {type(denoiser.conditioning).__name__}"
        )
    if (net.time_scale, net.time_offset) != (1000.0, 0.0):
        raise ValueError(
            "time_scale and time_offset of UNet2D must be 1000 and 0 for diffusers to call the network at the same "
            f"times, got {net.time_scale:g} and {net.time_offset:g}"
        )
    # Its boundary condition is ours where the noise that it takes for clean is none.
    scheduler = diffusers.CMStochasticIterativeScheduler(
        sigma_min=0.0, sigma_max=process.sigma_max, sigma_data=denoiser.sigma_data, clip_denoised=False
    )
    diffusers.ConsistencyModelPipeline(unet=net.model, scheduler=scheduler).save_pretrained(folder)


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError('this needs diffusers: pip install "lit-methods[diffusion]"') from error
    return diffusers


def _sample_shape(config: Any) -> list[int] | None:
    size = config.sample_size
    if size is None:
        return None
    return [config.in_channels, *(size if isinstance(size, list | tuple) else (size, size))]


def _check_times(scale: float, offset: float) -> None:
    if not 0 < scale < math.inf:
        raise ValueError(f"time_scale must be > 0 and finite, got {scale}")
    if not math.isfinite(offset):
        raise ValueError(f"time_offset must be finite, got {offset}")
