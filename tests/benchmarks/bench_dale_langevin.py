"""Steps of the sign-preserving optimizers beside torch's own.

Run ``python -m tests.benchmarks.bench_dale_langevin``. On a CPU by processor time of one thread.
"""

import time

import torch

from lit_methods.nets import MLP, CIFARResNet
from lit_methods.optim import AdamWExponentiated, ExponentiatedGradient, SignConstrainedSGD
from tests.benchmarks import harness

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NETWORKS = {
    "MLP 784-2048-2048-10 (5.8 M in 6 tensors)": lambda: MLP(784, [2048, 2048], 10),
    "ResNet-20 (0.27 M in 65 tensors)": lambda: CIFARResNet(20),
}


def step() -> None:
    """One step with gradients in place. The floor is a copy of the bytes that EG must move: read w and g, write w."""
    clock = time.perf_counter
    if DEVICE == "cpu":
        torch.set_num_threads(1)
        clock = time.process_time
    for title, make in NETWORKS.items():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(p.detach().clone()) for p in make().to(DEVICE).parameters()]
        for p in params:
            p.data.add_(1e-3)  # no zeros
            p.grad = 1e-6 * torch.randn_like(p)
        compiled = ExponentiatedGradient(params, 1e-6, error_if_nonfinite=False)
        contenders: dict[str, harness.Work] = {
            "torch AdamW (fused)": torch.optim.AdamW(params, 1e-6, fused=True).step,
            "torch AdamW": torch.optim.AdamW(params, 1e-6).step,
            "torch SGD, momentum": torch.optim.SGD(params, 1e-6, momentum=0.9).step,
            "ExponentiatedGradient": ExponentiatedGradient(params, 1e-6).step,
            "ExponentiatedGradient, error_if_nonfinite=False": ExponentiatedGradient(
                params, 1e-6, error_if_nonfinite=False
            ).step,
            "ExponentiatedGradient, torch.compile": torch.compile(compiled.step),
            "ExponentiatedGradient, momentum": ExponentiatedGradient(params, 1e-6, momentum=0.9).step,
            "AdamWExponentiated": AdamWExponentiated(params, 1e-6).step,
            "SignConstrainedSGD, momentum": SignConstrainedSGD(params, 1e-6, momentum=0.9).step,
        }
        source = torch.ones(3 * sum(p.numel() for p in params) // 2, device=DEVICE)
        target = torch.empty_like(source)
        contenders["floor"] = lambda target=target, source=source: target.copy_(source)
        seconds = harness.alternate(contenders, rounds=15, warmup=3, clock=clock)
        harness.save("dale_langevin", f"step, {title}", harness.ratios(seconds, "torch AdamW"))


if __name__ == "__main__":
    step()
