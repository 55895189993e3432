"""A checkpoint that stands in for that of recipe diffusion_principles/digits_flow: its format, untrained weights."""

from pathlib import Path

import torch

from lit_methods.diffusion import Diffusion, TimeMLP


def write_digits_teacher(path: Path) -> None:
    """Write the checkpoint."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Diffusion(TimeMLP([1, 8, 8], width=16), seed=0)
    net = {"class_path": "lit_methods.diffusion.TimeMLP", "init_args": {"shape": [1, 8, 8], "width": 16}}
    checkpoint = {
        "state_dict": module.state_dict(),
        "pytorch-lightning_version": "2.6.0",
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "net": net,
            "_class_path": "lit_methods.diffusion.Diffusion",
            "_instantiator": "lightning.pytorch.cli.instantiate_module",
        },
    }
    module.on_save_checkpoint(checkpoint)
    path.parent.mkdir(parents=True)
    torch.save(checkpoint, path)
