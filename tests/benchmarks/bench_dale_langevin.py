"""Steps of the sign-preserving optimizers beside torch's own; sampler steps beside a scheduler of diffusers.

Run ``python -m tests.benchmarks.bench_dale_langevin [section ...]``; sections: step, sampler. On a CPU by processor
time of one thread.
"""

import sys
import time

import torch

from lit_methods.diffusion import DDIM, DLS, UMS, DPMSolverPP, GeometricBrownian
from lit_methods.diffusion.solvers import nodes
from lit_methods.nets import MLP, CIFARResNet
from lit_methods.optim import AdamWExponentiated, ExponentiatedGradient, SignConstrainedSGD
from tests.benchmarks import harness

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCK = time.perf_counter if DEVICE == "cuda" else time.process_time
NETWORKS = {
    "MLP 784-2048-2048-10 (5.8 M in 6 tensors)": lambda: MLP(784, [2048, 2048], 10),
    "ResNet-20 (0.27 M in 65 tensors)": lambda: CIFARResNet(20),
}


def step() -> None:
    """One step with gradients in place. The floor is a copy of the bytes that EG must move: read w and g, write w."""
    for title, make in NETWORKS.items():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(p.detach().clone()) for p in make().to(DEVICE).parameters()]
        for p in params:
            p.data.add_(1e-3)  # no zeros
            p.grad = 1e-6 * torch.randn_like(p)
        compiled = ExponentiatedGradient(params, 1e-6, skip_nonfinite=False)
        contenders: dict[str, harness.Work] = {
            "torch AdamW (fused)": torch.optim.AdamW(params, 1e-6, fused=True).step,
            "torch AdamW": torch.optim.AdamW(params, 1e-6).step,
            "torch SGD, momentum": torch.optim.SGD(params, 1e-6, momentum=0.9).step,
            "ExponentiatedGradient": ExponentiatedGradient(params, 1e-6).step,
            "ExponentiatedGradient, skip_nonfinite=False": ExponentiatedGradient(
                params, 1e-6, skip_nonfinite=False
            ).step,
            "ExponentiatedGradient, torch.compile": torch.compile(compiled.step),
            "ExponentiatedGradient, momentum": ExponentiatedGradient(params, 1e-6, momentum=0.9).step,
            "AdamWExponentiated": AdamWExponentiated(params, 1e-6).step,
            "SignConstrainedSGD, momentum": SignConstrainedSGD(params, 1e-6, momentum=0.9).step,
        }
        source = torch.ones(3 * sum(p.numel() for p in params) // 2, device=DEVICE)
        target = torch.empty_like(source)
        contenders["floor"] = lambda target=target, source=source: target.copy_(source)
        seconds = harness.alternate(contenders, rounds=15, warmup=3, clock=CLOCK)
        harness.save("dale_langevin", f"step, {title}", harness.ratios(seconds, "torch AdamW"))


def sampler() -> None:
    """100 steps for 64 images of 28x28 pixels with a network that costs nothing: what the sampler itself takes."""
    process, steps = GeometricBrownian(), 100
    y = torch.randn(64, 1, 28, 28, device=DEVICE)
    path = nodes(process, torch.arange(steps, -1, -1, dtype=torch.float64) / steps)
    contenders: dict[str, harness.Work] = {
        name: lambda solver=solver: solver.solve(lambda y, t: y, y, path, process, torch.randn_like)
        for name, solver in {"DLS": DLS(), "UMS": UMS(), "ODE (ddim)": DDIM(), "dpmpp_2m": DPMSolverPP()}.items()
    }
    diffusers = harness.peer("diffusers")
    if diffusers is not None:
        scheduler = diffusers.DDPMScheduler(clip_sample=False)
        scheduler.set_timesteps(steps)

        def ddpm() -> torch.Tensor:
            x = y
            for t in scheduler.timesteps:
                x = scheduler.step(x, t, x).prev_sample
            return x

        contenders["diffusers DDPMScheduler.step"] = ddpm
    seconds = harness.alternate(contenders, rounds=15, warmup=2, clock=CLOCK)
    baseline = "diffusers DDPMScheduler.step" if diffusers is not None else "DLS"
    harness.save("dale_langevin", "sampler, 100 steps", harness.ratios(seconds, baseline), ("diffusers",))


SECTIONS = {"step": step, "sampler": sampler}

if __name__ == "__main__":
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    for section in sys.argv[1:] or SECTIONS:
        SECTIONS[section]()
