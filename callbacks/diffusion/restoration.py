"""An unconditional model restores images: what is missing is sampled to fit what is seen."""

from collections.abc import Callable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from lit_methods.callbacks.diffusion.sample_grid import draw_samples
from lit_methods.callbacks.figures import output_dir, save_figure
from lit_methods.diffusion import LossGuidance, sample
from lit_methods.diffusion.streams import stream


class RestorationGrid(Callback):
    """When ``fit`` ends, fill in halves of test images and enlarge small ones by guidance: ``restoration.png``.

    For a module with a ``denoiser``, as :class:`~lit_methods.diffusion.Diffusion` is. Three rows for each task: the
    images, what the model sees of them, what it makes of that. ``errors`` holds the root mean square difference, in
    what was seen, of restored images and, for comparison, of unguided samples.

    Args:
        num_images: images of the first test batch, >= 1.
        scale: strength of the guidance, > 0.
        steps: steps of the solver, >= 1.
        factor: how much smaller the small images are, >= 2; divides height and width.
        seed: of the noise, >= 0.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self, num_images: int = 8, scale: float = 1.0, steps: int = 100, factor: int = 2, seed: int = 0
    ) -> None:
        for name, value, low in (("num_images", num_images, 1), ("steps", steps, 1), ("factor", factor, 2)):
            if value < low:
                raise ValueError(f"{name} must be >= {low}, got {value}")
        if not scale > 0:
            raise ValueError(f"scale must be > 0, got {scale}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        self.num_images = num_images
        self.scale = scale
        self.steps = steps
        self.factor = factor
        self.seed = seed
        self.errors: dict[str, float] = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore and draw, on rank zero."""
        folder = output_dir(trainer)
        datamodule = getattr(trainer, "datamodule", None)
        if not trainer.is_global_zero or datamodule is None:
            return
        datamodule.setup("test")
        rows = datamodule.test_data
        x = (rows if datamodule.transform is None else datamodule.transform(rows))[0][: self.num_images]
        x = x.to(pl_module.device)
        tasks: dict[str, Callable[[Tensor], Tensor]] = {
            "inpainting": lambda x: x[..., : x.shape[-1] // 2],
            "super-resolution": lambda x: torch.nn.functional.avg_pool2d(x, self.factor),
        }
        figure = Figure(figsize=(len(x), 6.5), layout="constrained")
        for axes, (task, observe) in zip(figure.subplots(2, 1), tasks.items(), strict=True):
            seen = observe(x)

            def loss(x0: Tensor, observe: Callable[[Tensor], Tensor] = observe, seen: Tensor = seen) -> Tensor:
                # By the number of pixels in each value seen, whose mean moves each of them that much less.
                return x0.numel() / seen.numel() * (observe(x0) - seen).square().flatten(1).sum(1)

            guidance = LossGuidance(loss, self.scale)
            restored, free = (
                sample(
                    pl_module.denoiser,  # type: ignore[arg-type]
                    x.shape,
                    steps=self.steps,
                    solver="ancestral",
                    guidance=steer,
                    generator=stream(pl_module.device, self.seed, task),
                )
                for steer in (guidance, 1.0)
            )
            for name, made in ((task, restored), (f"{task} without guidance", free)):
                self.errors[name] = float((observe(made) - seen).square().mean().sqrt())
            axes.set_title(f"{task}: images, what is seen, what is made of it")
            draw_samples(axes, torch.cat([x, _enlarged(seen, x), restored]).cpu(), columns=len(x))
        save_figure(trainer, figure, "restoration", folder)


def _enlarged(seen: Tensor, like: Tensor) -> Tensor:
    """What is seen, in the size of the images; grey where nothing is."""
    if seen.shape[-2] < like.shape[-2]:
        return torch.nn.functional.interpolate(seen, like.shape[-2:])
    missing = like.shape[-1] - seen.shape[-1]
    return torch.nn.functional.pad(seen, (0, missing), value=float(like.mean()))
