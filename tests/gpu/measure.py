"""Times on a GPU, beside the floor of bytes or arithmetic and a peer on the same card.

``python -m tests.gpu.measure FOLDER`` writes ``gpu.json`` and ``gpu.md``; ``check.sh`` calls it. Each measurement
stands alone: one that fails is written down with its error, and the others go on. In a dry run all sizes are tiny.
"""

import importlib.util
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.nn import functional

from lit_methods.batches import TransitionBatch
from lit_methods.diffusion import Diffusion, TimeMLP
from lit_methods.llm import FunctionJudge, Generation, Loading, NashMP
from lit_methods.nets import MLP
from lit_methods.optim import CBO, MDPO, MFAC, SSO
from lit_methods.optim.sso import GaussNewton
from lit_methods.rl import OffPolicyMDPO
from lit_methods.rl.networks import TanhGaussianActor, TwinCritic, ValueNetwork
from lit_methods.transport import sinkhorn_newton
from lit_methods.vi import PVRNN
from tests.benchmarks import harness
from tests.benchmarks.bench_f_distill import contenders
from tests.benchmarks.bench_mult_vae import BATCH, NUM_ITEMS, part, stepper, synthetic
from tests.gpu.device import DEVICE, DRY_RUN

Row = dict[str, Any]
PACKAGES = ("lit-methods", "lightning", "transformers", "peft", "triton", "POT")


def milliseconds(work: Callable[[], object], repeats: int = 20, warmup: int = 3) -> list[float]:
    """Time of each call: between two CUDA events, or by the clock on the CPU."""
    if DRY_RUN:
        repeats, warmup = 2, 1
    for _ in range(warmup):
        work()
    if DEVICE == "cpu":
        return [1e3 * seconds for seconds in harness.alternate({"": work}, rounds=repeats, warmup=0)[""]]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def row(method: str, size: str, times: list[float], floor_ms: float | None = None, **more: Any) -> Row:
    """One line of the table; ``floor_ms`` is what bandwidth or arithmetic allow."""
    low, middle, high = quantiles(times, n=4, method="inclusive")
    found: Row = {"method": method, "size": size, "ms": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}
    if floor_ms is not None:
        found |= {"floor_ms": round(floor_ms, 4), "ms / floor": round(middle / floor_ms, 2)}
    if DEVICE == "cuda":
        found["peak_MB"] = round(torch.cuda.max_memory_allocated() / 1e6)
    return found | more


class Rates:
    """What this device does at most: bytes copied, and flops of a large product, per millisecond."""

    def __init__(self) -> None:
        self.bytes = harness.copy_bandwidth(8 if DRY_RUN else 2048, DEVICE) / 1e3
        size = 256 if DRY_RUN else 8192
        self.flops = {}
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.randn(size, size, device=DEVICE, dtype=dtype)
            self.flops[dtype] = 2 * size**3 / median(milliseconds(lambda a=a: a @ a))


def mfac(rates: Rates) -> Iterator[Row]:
    """A step reads the window twice; the authors' own takes time as ``d m + m^3`` (arXiv 2107.03356, section 3.2)."""
    for d in (1000,) if DRY_RUN else (270_000, 10_000_000, 100_000_000):
        for m in (4,) if DRY_RUN else (128, 512, 1024):
            for name, width in (("float32", 4), ("bfloat16", 2)):
                if DEVICE == "cuda" and m * d * width > 0.6 * torch.cuda.mem_get_info()[0]:
                    continue
                p = nn.Parameter(torch.zeros(d, device=DEVICE))
                p.grad = torch.randn_like(p)
                step = MFAC([p], num_grads=m, history_dtype=name).step
                floor = 2 * m * d * width / rates.bytes
                law = floor + m**3 / rates.flops[torch.float32]
                size = f"d={d:.1e}, m={m}, {name} window"
                yield row("M-FAC step", size, milliseconds(step), floor, **{"authors' law_ms": round(law, 4)})


def sso(rates: Rates) -> Iterator[Row]:
    """What one more inner step costs, beside a forward and backward pass of the network."""
    batch, width = (8, 16) if DRY_RUN else (1024, 2048)
    network = MLP(width, [width, width], 10).to(DEVICE)
    x, y = torch.randn(batch, width, device=DEVICE), torch.randint(10, (batch,), device=DEVICE)

    def stepper_of(inner_steps: int) -> Callable[[], object]:
        optimizer = SSO(network.parameters(), lr=1e-3, inner=GaussNewton(steps=inner_steps, tol=0.0))
        return lambda: optimizer.step(lambda: (network(x), lambda z: functional.cross_entropy(z, y)))

    def plain() -> None:
        functional.cross_entropy(network(x), y).backward()

    few, many = (milliseconds(stepper_of(steps)) for steps in (5, 25))
    each = [(b - a) / 20 for a, b in zip(few, many, strict=True)]
    yield row(
        "SSO inner step",
        f"MLP of width {width}, batch {batch}",
        each,
        forward_backward_ms=round(median(milliseconds(plain)), 4),
    )


def cbo(rates: Rates) -> Iterator[Row]:
    """A step reads and writes the particles, writes and reads the noise, and reads the particles for the consensus."""
    n, d = (10, 20) if DRY_RUN else (1000, 100_000)
    x = nn.Parameter(torch.zeros(d, device=DEVICE))
    optimizer = CBO([("x", x)], num_particles=n, seed=0)
    times = milliseconds(lambda: optimizer.step(lambda particles: particles["x"].square().sum(-1)))
    yield row("CBO step, sum of squares", f"N={n}, d={d}", times, 6 * 4 * n * d / rates.bytes)


def sinkhorn(rates: Rates) -> Iterator[Row]:
    """The floor is one pass over the costs and one over the plan."""
    shapes = [(2, 20)] if DRY_RUN else [(1, 1000), (1, 5000), (1, 20000), (32, 500)]
    for batch, n in shapes:
        torch.manual_seed(0)
        cost = torch.rand(batch, n, n, device=DEVICE, dtype=torch.float64)
        a = torch.full((batch, n), 1 / n, device=DEVICE, dtype=torch.float64)
        times = milliseconds(lambda c=cost, a=a: sinkhorn_newton(c, a, a, eta=1200.0), repeats=5, warmup=1)
        more: Row = {}
        if batch == 1 and n <= 5000 and importlib.util.find_spec("ot"):
            import ot

            solve = lambda c=cost[0], a=a[0]: ot.sinkhorn(a, a, c, 1 / 1200, stopThr=1e-9, numItermax=100_000)  # noqa: E731
            more["ot.sinkhorn_ms"] = round(median(milliseconds(solve, repeats=3, warmup=1)), 2)
        yield row("Sinkhorn-Newton", f"{batch} x {n} x {n}, eta=1200", times, 2 * cost.nbytes / rates.bytes, **more)


def mult_vae(rates: Rates) -> Iterator[Row]:
    """The floor is the three products of the output layer."""
    from lightning.fabric.utilities import move_data_to_device

    from lit_methods.vi import MultVAE

    users = 8 if DRY_RUN else BATCH
    histories = synthetic(users * 2)
    batches = [move_data_to_device(part(histories, start, start + users), DEVICE) for start in (0, users)]
    model = MultVAE(NUM_ITEMS, total_anneal_steps=0).to(DEVICE)
    model.log = model.log_dict = lambda *_, **__: None  # type: ignore[assignment, method-assign]
    step = stepper(batches, model.configure_optimizers(), lambda batch: model.training_step(batch, 0))
    floor = 2 * users * 600 * NUM_ITEMS * 3 / rates.flops[torch.float32]
    yield row("Mult-VAE update", f"{users} users, {NUM_ITEMS} items", milliseconds(step), floor)


def mdpo(rates: Rates) -> Iterator[Row]:
    """Off-policy updates in a Trainer, on transitions that are there already."""
    updates, size = (5, 8) if DRY_RUN else (1000, 256)
    none = torch.empty(0)
    batch = TransitionBatch(
        torch.randn(size, 11), torch.rand(size, 3), torch.randn(size), torch.randn(size, 11), torch.zeros(size), none,
        torch.tensor(0),
    )  # fmt: skip
    module = OffPolicyMDPO(
        TanhGaussianActor(11, 3, [size, size], low=-1.0, high=1.0),
        TwinCritic(11, 3, [size, size]),
        ValueNetwork(11, [size, size], "ReLU", "default"),
        optimizer=lambda params: MDPO(params, inner_steps=1, anchor="parameters", max_grad_norm=None, fused=True),
    )
    trainer = L.Trainer(
        max_steps=updates, accelerator=DEVICE, devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(module, torch.utils.data.DataLoader([batch] * updates, batch_size=None))  # type: ignore[arg-type]
    each = 1e3 * (time.perf_counter() - start) / updates
    yield row("off-policy MDPO update in a Trainer", f"batch {size}, width {size}", [each] * 2)


def nash_mp(rates: Rates) -> Iterator[Row]:
    """Nash Prox with LoRA on a model of Qwen2-0.5B's shape with random weights: 32 prompts, 256 new tokens."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 4864, "vocab_size": 151936}
    prompts, tokens, steps = 32, 256, 3
    if DRY_RUN:
        shape |= {"hidden_size": 28, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 200}
        prompts, tokens, steps = 2, 4, 2
    words = [f"x{i}" for i in range(shape["vocab_size"] - 2)]
    with tempfile.TemporaryDirectory() as folder:
        Qwen2ForCausalLM(Qwen2Config(**shape)).to(torch.bfloat16).save_pretrained(folder)
        module = NashMP(
            folder, FunctionJudge(lambda prompt, a, b: 0.5), {"words": words},
            generation=Generation(max_new_tokens=tokens),
            loading=Loading(dtype="bfloat16", gradient_checkpointing=True),
            lora={"r": 16, "target_modules": ["q_proj", "v_proj"]},
        )  # fmt: skip
        texts = [" ".join(f"x{i}" for i in torch.randint(len(words), (16,)).tolist()) for _ in range(prompts * steps)]
        from lit_methods.datamodules import PromptDataModule

        trainer = L.Trainer(
            max_steps=steps, accelerator=DEVICE, devices=1, precision="bf16-mixed", log_every_n_steps=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module, PromptDataModule(texts, val_size=0, batch_size=prompts))
    found = {name.removeprefix("train/"): float(value) for name, value in trainer.callback_metrics.items()}
    times = {name.removeprefix("time/"): seconds for name, seconds in found.items() if name.startswith("time/")}
    whole = sum(times.values())
    shares = {f"share of {name}": round(seconds / whole, 3) for name, seconds in times.items()}
    size = f"{prompts} x {tokens} tokens, hidden {shape['hidden_size']}"
    rate = round(found["tokens_per_s/generated"], 1)
    yield row("Nash Prox step", size, [1e3 * whole] * 2, **{"generated tokens/s": rate, **shares})


def fractional_sde(rates: Rates) -> Iterator[Row]:
    """A pass over a latent SDE's posterior, forward and backward; the floor is its networks' arithmetic."""
    from lit_methods.vi import ControlMLP, DiagonalDiffusion, DriftMLP, FractionalSDE, MarkovFBM

    batch, dim, steps, width = (4, 2, 8, 8) if DRY_RUN else (32, 6, 72, 200)  # the paper's video model
    for kind in ("white", "I"):
        noise = MarkovFBM(5, 10.0, 2.4, kind)  # type: ignore[arg-type]
        control = ControlMLP(dim, noise.num_ou, [width, width], periodic_time=False)
        sde = FractionalSDE(
            DriftMLP(dim, [width, width]), DiagonalDiffusion(dim, [width, width]), control, noise, dim, dt=2.4 / 72
        ).to(DEVICE)
        x0, times = torch.zeros(batch, dim, device=DEVICE), torch.linspace(0, 2.4 * steps / 72, 2)

        def work(sde: FractionalSDE = sde, x0: torch.Tensor = x0, times: torch.Tensor = times) -> None:
            path = sde(x0, times)
            (path.path_kl.mean() + path.x.square().mean()).backward()

        flops = 6 * batch * steps * (dim + 2) * width * width
        size = f"batch {batch}, {steps} steps, kind {kind}"
        yield row(
            "fractional SDE, forward and backward", size, milliseconds(work, 5), flops / rates.flops[torch.float32]
        )


def diffusion(rates: Rates) -> Iterator[Row]:
    """The floor is the network alone: a forward and backward pass for training, one forward pass for a step of DDIM."""
    batch, width, steps = (8, 16, 4) if DRY_RUN else (4096, 1024, 50)
    network = TimeMLP([64], width)
    module = Diffusion(network, seed=0).to(DEVICE)
    x, times = torch.randn(batch, 64, device=DEVICE), torch.rand(batch, device=DEVICE)

    def passes() -> None:
        network(x, times).square().mean().backward()

    @torch.no_grad()
    def forward() -> None:
        network(x, times)

    size = f"MLP of width {width}, batch {batch}"
    step = milliseconds(lambda: module.loss(x).backward())
    yield row("Diffusion, loss and gradient", size, step, median(milliseconds(passes)))
    sample = lambda: module.sample(batch, solver="ddim", steps=steps, shape=[64])  # noqa: E731
    floor = steps * median(milliseconds(forward))
    yield row("Diffusion, sampling", f"{size}, {steps} steps of DDIM", milliseconds(sample, repeats=5, warmup=1), floor)


def f_distill(rates: Rates) -> Iterator[Row]:
    """Five iterations of f-distill; the floor is the passes through its networks."""
    batch, side = (2, 8) if DRY_RUN else (256, 32)
    work = contenders(batch, side, DEVICE)
    floor = median(milliseconds(work["network passes"]))
    for name in ("f-distill, js", "f-distill, rkl (DMD2)", "consistency training"):
        yield row(f"{name}, 5 iterations", f"UNet, batch {batch} of 3x{side}x{side}", milliseconds(work[name]), floor)


def programmable_vi(rates: Rates) -> Iterator[Row]:
    """A gradient of the ELBO of the paper's autoencoder, beside the same written by hand."""
    from lit_methods.vi.programmable import elbo
    from tests.benchmarks import bench_programmable_vi as bench

    for batch in (8,) if DRY_RUN else (64, 256, 1024):
        model, guide, data = bench.vae_parts(batch)
        by_hand = median(milliseconds(bench.by_hand(model, guide, data, False)))
        step = milliseconds(bench.ours(elbo(model, guide), data, [model, guide]))
        yield row(
            "Programmable VI, gradient of the ELBO", f"784-200-10, batch {batch}", step, by_hand_ms=round(by_hand, 4)
        )


def pv_rnn(rates: Rates) -> Iterator[Row]:
    """The floor is the arithmetic; a step of 100 is three small products, so that launches decide."""
    batch, steps, sizes = (2, 4, [8, 4]) if DRY_RUN else (64, 100, [80, 40, 20])
    latents = [max(1, n // 5) for n in sizes]
    network = PVRNN(17, sizes, latents, [2.0, 4.0, 8.0][: len(sizes)]).to(DEVICE)
    adaptive = torch.zeros(batch, steps, network.adaptive_size, device=DEVICE, requires_grad=True)

    def passes() -> None:
        out = network.posterior(adaptive)
        (out.mean.square().sum() + out.kl.sum()).backward()

    floor = 6 * batch * steps * network.weight.numel() / rates.flops[torch.float32]
    yield row(
        "PV-RNN, forward and backward", f"{batch} x {steps} steps, {sum(sizes)} units", milliseconds(passes), floor
    )


def shown(found: Row) -> Row:
    """The row with what only some methods have in one last column."""
    columns = ("method", "size", "ms", "quartiles", "floor_ms", "ms / floor", "peak_MB")
    rest = ", ".join(f"{name} {value}" for name, value in found.items() if name not in columns)
    return {name: found.get(name, "") for name in columns} | {"more": rest}


MEASUREMENTS = [
    mfac, sso, cbo, sinkhorn, mult_vae, mdpo, nash_mp, diffusion, f_distill, pv_rnn, fractional_sde, programmable_vi,
]  # fmt: skip


def main(folder: Path) -> int:
    """Measure everything; returns how many measurements failed."""
    rates = Rates()
    rows: list[Row] = []
    failed = 0
    for measure in MEASUREMENTS:
        try:
            for found in measure(rates):
                rows.append(found)
                print(found, flush=True)
        except Exception as error:
            traceback.print_exc()
            failed += 1
            rows.append({"method": measure.__name__, "error": f"{type(error).__name__}: {error}"[:300]})
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    content = {
        "dry_run": DRY_RUN,
        "environment": harness.environment(PACKAGES),
        "copy_GB_per_s": round(rates.bytes / 1e6, 1),
        "Tflop_per_s": {str(dtype): round(flops / 1e9, 1) for dtype, flops in rates.flops.items()},
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "gpu.md").write_text(harness.markdown([shown(found) for found in rows]) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
