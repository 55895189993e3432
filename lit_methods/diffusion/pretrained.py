"""Trained denoisers from checkpoints of a Trainer: teachers, warm starts, weak models."""

import hashlib
import importlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lit_methods.diffusion.denoiser import Denoiser

_PARTS = ("denoiser", "student")


def load_denoiser(checkpoint: str, denoiser: Denoiser | None = None) -> Denoiser:
    """The denoiser of a checkpoint of ``Diffusion``, ``FlowMap`` or ``FDistill`` (its student).

    Beside ``SubmoduleEMA`` the weights are the average. In a recipe it stands where a denoiser is asked for, as
    ``class_path: lit_methods.diffusion.load_denoiser``.

    Args:
        checkpoint: file that a Trainer wrote.
        denoiser: one of the same network, which gets the weights; ``None`` builds it from what the checkpoint says of
            its module, which only one that the command line built does.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a checkpoint of another kind, or one that does not say how its module was built.
        RuntimeError: the weights are of another network.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint must be a file that a Trainer wrote; there is no {checkpoint}")
    content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state = content.get("state_dict", {})
    part = next((part for part in _PARTS if any(name.startswith(f"{part}.") for name in state)), None)
    if part is None:
        raise ValueError(f"checkpoint must hold one of {list(_PARTS)}, which {checkpoint} does not")
    if denoiser is not None:
        weights = {name.removeprefix(f"{part}."): v for name, v in state.items() if name.startswith(f"{part}.")}
        denoiser.load_state_dict(weights)
        return denoiser
    path = content.get("hyper_parameters", {}).get("_class_path")
    if path is None:
        raise ValueError(
            f"denoiser must be given for {checkpoint}, whose module was not built by the command line, so that the "
            "checkpoint does not say how"
        )
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    if not (isinstance(kind, type) and issubclass(kind, LightningModule)):
        raise ValueError(f"checkpoint must be of a LightningModule, got {path}")
    loaded = kind.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    found: Denoiser = loaded.get_submodule(part)  # type: ignore[assignment]
    return found


def fingerprint(denoiser: Denoiser) -> str:
    """A hash of the weights, the process and the prediction."""
    digest = hashlib.blake2b(f"{denoiser.process} {denoiser.prediction}".encode(), digest_size=16)
    for name, value in denoiser.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
