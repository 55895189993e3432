"""Training step, solver overhead and quality at equal network calls of the diffusion core beside its peers.

``python -m tests.benchmarks.bench_diffusion_principles [step] [solver] [quality]``; peers that are not installed are
left out (see requirements.txt). The floor of a training step is the bare network's forward and backward pass.
"""

import sys
import time

import torch
from torch import Tensor, nn

from lit_methods.diffusion import Denoiser, DPMSolverPP, Solver, TimeMLP, sample
from lit_methods.diffusion.diffusion import denoising_loss
from lit_methods.diffusion.solvers import DDIM, Euler
from lit_methods.diffusion.time_samplers import UniformTimes
from tests.benchmarks.harness import Row, alternate, peer, ratios, save

PACKAGES = ("torch", "diffusers", "torchcfm", "flow_matching", "denoising-diffusion-pytorch")


def bench_step(batch: int = 256, rounds: int = 31) -> None:
    """One step of flow matching on 8x8 images: draw, add noise, forward, backward; no optimizer, which all share."""
    torch.manual_seed(0)
    net = TimeMLP([1, 8, 8])
    x0 = torch.randn(batch, 1, 8, 8)
    denoiser, sampler = Denoiser(net, "fm", "flow"), UniformTimes()

    def backward(loss: Tensor) -> None:
        net.zero_grad()
        loss.backward()

    def floor() -> None:
        t = torch.full((batch,), 0.5)
        backward(net(x0, t).square().mean())

    def ours() -> None:
        t = sampler.sample(batch, denoiser.process, stratified=True)
        backward(denoising_loss(denoiser, x0, torch.randn_like(x0), t).mean())

    work = {"bare network": floor, "ours": ours}
    if cfm := peer("torchcfm"):
        matcher = cfm.ConditionalFlowMatcher(sigma=0.0)

        def torchcfm() -> None:
            t, xt, ut = matcher.sample_location_and_conditional_flow(x0, torch.randn_like(x0))
            backward((net(xt, t) - ut).square().mean())

        work["torchcfm"] = torchcfm
    if peer("flow_matching"):
        path_module, scheduler = peer("flow_matching.path"), peer("flow_matching.path.scheduler")
        assert path_module is not None
        assert scheduler is not None
        path = path_module.AffineProbPath(scheduler=scheduler.CondOTScheduler())

        def flow_matching() -> None:
            drawn = path.sample(t=torch.rand(batch), x_0=torch.randn_like(x0), x_1=x0)
            backward((net(drawn.x_t, drawn.t) - drawn.dx_t).square().mean())

        work["flow_matching"] = flow_matching
    if diffusers := peer("diffusers"):
        ddpm = diffusers.DDPMScheduler()

        def script() -> None:
            t, noise = torch.randint(1000, (batch,)), torch.randn_like(x0)
            backward((net(ddpm.add_noise(x0, noise, t), t / 1000) - noise).square().mean())

        work["diffusers script"] = script
    save(
        "diffusion_principles",
        "training step",
        ratios(alternate(work, rounds, clock=time.process_time), "bare network"),
        PACKAGES,
    )


def bench_solver(steps: int = 20, rounds: int = 31) -> None:
    """Milliseconds of 20 steps without a network: what solvers cost themselves."""
    diffusers = peer("diffusers")
    x = torch.randn(16, 3, 32, 32)
    out = torch.randn_like(x)
    rows: list[Row] = []
    pairs: list[tuple[str, Solver, str, str, object]] = []
    if diffusers is not None:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        pairs = [
            ("dpmpp_2m", DPMSolverPP(), "fm", "flow", diffusers.DPMSolverMultistepScheduler(**flow)),
            ("euler", Euler(), "fm", "flow", diffusers.FlowMatchEulerDiscreteScheduler()),
            ("ddim", DDIM(), "vp_linear", "epsilon", diffusers.DDIMScheduler(clip_sample=False)),
        ]
    for name, solver, process, prediction, scheduler in pairs:
        denoiser = Denoiser(lambda x, t: out, process, prediction)

        def theirs(scheduler=scheduler) -> None:
            scheduler.set_timesteps(steps)
            y = x
            for t in scheduler.timesteps:
                y = scheduler.step(out, t, y).prev_sample

        def ours(denoiser=denoiser, solver=solver) -> None:
            sample(denoiser, x_init=x, solver=solver, steps=steps)

        found = ratios(alternate({"diffusers": theirs, "ours": ours}, rounds, clock=time.process_time), "diffusers")
        rows += [{"solver": name, **row} for row in found]
    save("diffusion_principles", "solver overhead", rows, PACKAGES)


def bench_quality(rounds: int = 1) -> None:
    """Error of the end point for a mixture of Gaussians whose flow is known, at equal network calls."""
    from lit_methods.datamodules import Mixture2DDataModule

    diffusers = peer("diffusers")
    data = Mixture2DDataModule()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 2, dtype=torch.float64, generator=generator)
    exact = data.flow_map(x, 1.0, 1e-4, steps=1000)

    class Exact(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return data.velocity(x, 1 - t, t, -1.0, 1.0)

    denoiser = Denoiser(Exact(), "fm", "flow")
    rows: list[Row] = []
    for calls in (5, 10, 20):
        row: Row = {"network calls": calls}
        for grid in ("uniform", "karras", "lambda"):
            for solver in ("euler", "dpmpp_2m", "heun"):
                steps = calls if solver != "heun" else (calls + 1) // 2
                out = sample(denoiser, x_init=x, solver=solver, steps=steps, grid=grid)
                row[f"ours {solver} {grid}"] = f"{float((out - exact).square().sum(1).mean().sqrt()):.4f}"
        if diffusers is not None:
            flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
            for name, scheduler in (
                ("Euler", diffusers.FlowMatchEulerDiscreteScheduler()),
                ("DPM++2M", diffusers.DPMSolverMultistepScheduler(**flow)),
                ("UniPC", diffusers.UniPCMultistepScheduler(**flow)),
                ("Heun", diffusers.FlowMatchHeunDiscreteScheduler()),
            ):
                if name == "Euler":
                    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / calls, calls).tolist())
                else:
                    scheduler.set_timesteps((calls + 1) // 2 if name == "Heun" else calls)
                y = x.float().view(-1, 1, 2, 1)
                for t in scheduler.timesteps:
                    time = torch.full((len(y),), float(t) / 1000, dtype=torch.float64)
                    velocity = denoiser(y.double().view(-1, 2), time).float().view_as(y)
                    y = scheduler.step(velocity, t, y).prev_sample
                error = (y.double().view(-1, 2) - exact).square().sum(1).mean().sqrt()
                row[f"diffusers {name}"] = f"{float(error):.4f}"
        rows.append(row)
    save("diffusion_principles", "end point error", rows, PACKAGES)


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = sys.argv[1:] or ["step", "solver", "quality"]
    for section, run in (("step", bench_step), ("solver", bench_solver), ("quality", bench_quality)):
        if section in chosen:
            run()
