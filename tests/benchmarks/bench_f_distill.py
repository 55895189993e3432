"""Iterations of f-distill beside the passes through its networks that they need, and beside its peers.

``python -m tests.benchmarks.bench_f_distill``. On PyPI there is no maintained trainer of DMD's kind: peers are the
reverse KL, which is DMD2, and consistency training of the same network and as many batches.
"""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lit_methods.diffusion import Denoiser, FDistill, FlowMap, UNet2D
from tests.benchmarks.harness import alternate, ratios, save

K = 5
NET = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
}  # fmt: skip


def cycle(module: FDistill, x: Tensor) -> Callable[[], None]:
    """``K`` iterations, without a Trainer's own time."""
    optimizers = module.configure_optimizers()
    module.optimizers = lambda *_: optimizers  # type: ignore[assignment, method-assign, return-value]
    module.lr_schedulers = lambda: None  # type: ignore[method-assign]
    trainer: Any = SimpleNamespace(global_rank=0, is_last_batch=False, log_every_n_steps=0)
    module._trainer = trainer
    module._next = 0

    def run() -> None:
        for i in range(K):
            module.training_step((x, None), i)

    return run


def passes(module: FDistill, x: Tensor) -> Callable[[], None]:
    """The same passes through the networks, and nothing else."""
    student, fake, teacher = module.student, module.fake_score, module.teacher
    t = torch.full(x.shape[:1], 1.0, device=x.device)

    def run() -> None:
        student(x, t).sum().backward()
        with torch.no_grad():
            fake(x, t)
        leaf = x.clone().requires_grad_()
        _, (features,) = teacher.with_features(leaf, t)
        torch.autograd.grad(features.sum(), leaf)
        for _ in range(K - 1):
            with torch.no_grad():
                student(x, t)
                teacher.features(torch.cat([x, x]), torch.cat([t, t]))
            fake(x, t).sum().backward()
        module.zero_grad()

    return run


def optimizer_steps(module: FDistill) -> Callable[[], None]:
    """One step of the student's optimizer, ``K - 1`` of the two others."""
    assert module.discriminator is not None
    parts = [module.student, module.fake_score, module.discriminator]
    optimizers = [module.optimizer(part.parameters()) for part in parts]
    gradients = [[torch.zeros_like(p) for p in part.parameters()] for part in parts]

    def run() -> None:
        for part, found in zip(parts, gradients, strict=True):
            for p, g in zip(part.parameters(), found, strict=True):
                p.grad = g
        optimizers[0].step()  # type: ignore[union-attr]
        for _ in range(K - 1):
            optimizers[1].step()  # type: ignore[union-attr]
            optimizers[2].step()  # type: ignore[union-attr]
        module.zero_grad()

    return run


def contenders(batch: int, side: int, device: str = "cpu") -> dict[str, Callable[[], object]]:
    """A name, and ``K`` iterations of it."""

    def denoiser() -> Denoiser:
        torch.manual_seed(0)
        return Denoiser(UNet2D({**NET, "sample_size": side}), "edm", "edm", "edm")

    def distill(divergence: str) -> FDistill:
        return FDistill(denoiser(), divergence=divergence, student_every=K, seed=0).to(device)

    x = torch.randn(batch, 3, side, side, device=device)
    bare, stepped = distill("js"), distill("js")
    network_passes, steps = passes(bare, x), optimizer_steps(stepped)
    consistency = FlowMap(UNet2D({**NET, "sample_size": side}), "consistency", seed=0).to(device)
    optimizer = torch.optim.AdamW(consistency.parameters(), lr=1e-4)

    def train_consistency() -> None:
        for _ in range(K):
            consistency.loss(x).backward()
            optimizer.step()
            optimizer.zero_grad()

    def floor() -> None:
        network_passes()
        steps()

    return {
        "network passes": network_passes,
        "network passes and optimizer steps": floor,
        "f-distill, js": cycle(distill("js"), x),
        "f-distill, rkl (DMD2)": cycle(distill("rkl"), x),
        "consistency training": train_consistency,
    }


def main(rounds: int = 11) -> None:
    """Measure on the CPU, on one thread."""
    times = alternate(contenders(batch=16, side=8), rounds, warmup=1, clock=time.process_time)
    save("f_distill", f"{K} iterations", ratios(times, "network passes"), ("torch", "diffusers"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
