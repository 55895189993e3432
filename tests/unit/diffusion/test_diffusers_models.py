import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from lit_methods.diffusion import (
    Critics,
    Denoiser,
    DiscreteVP,
    DiT,
    FDistill,
    FlowMap,
    Labels,
    Sequences,
    TimeMLP,
    UNet2D,
    UNet2DCondition,
    VPLinear,
    from_diffusers,
    sample,
    scaled_linear_vp,
    to_one_step_pipeline,
    to_pipeline,
    to_scheduler,
)

diffusers = pytest.importorskip("diffusers")

SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def ddpm(**config) -> "diffusers.DDPMScheduler":
    return diffusers.DDPMScheduler(**config)


def test_a_table_agrees_with_the_formula_it_was_made_of() -> None:
    exact = VPLinear()
    steps = torch.arange(1, 1001, dtype=torch.float64) / 1000
    table = DiscreteVP(tuple((exact.alpha(steps) ** 2).tolist()))
    t = torch.tensor([0.1234, 0.5, 0.9], dtype=torch.float64)
    for got, expected in zip(table.at(t), exact.at(t), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(table.t_from_lam(table.lam(t)), t, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(table.alpha(steps) ** 2, torch.tensor(table.alphas_cumprod).double())
    with pytest.raises(ValueError, match="alphas_cumprod must be falling"):
        DiscreteVP((0.5, 0.9))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_pipeline_folder_samples_as_in_diffusers(prediction: str, tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(
        prediction_type=prediction, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True
    )
    pipeline = diffusers.DDIMPipeline(diffusers.UNet2DModel(**SMALL), scheduler)
    pipeline.save_pretrained(tmp_path / "pipe")
    denoiser = from_diffusers(tmp_path / "pipe")
    x = torch.randn(2, 1, 8, 8)
    scheduler.set_timesteps(5)
    expected = x
    with torch.no_grad():
        for t in scheduler.timesteps:
            expected = scheduler.step(pipeline.unet(expected, t).sample, t, expected).prev_sample
    times = [*((int(t) + 1) / 1000 for t in scheduler.timesteps), 0.0]
    out = sample(denoiser, x_init=x, solver="ddim", times=times)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["vp", "fm"])
def test_our_model_becomes_a_folder_that_a_new_process_samples_from(kind: str, tmp_path: Path) -> None:
    model = diffusers.UNet2DModel(**SMALL)
    if kind == "vp":
        denoiser = Denoiser(UNet2D(model, 1000.0, -1.0), "vp_linear", "epsilon").eval()
    else:
        denoiser = Denoiser(UNet2D(model), "fm", "flow").eval()
    to_pipeline(denoiser, tmp_path / "pipe")
    script = (
        "import torch, diffusers; from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path / 'pipe')!r})\n"
        "pipe.set_progress_bar_config(disable=True)\n"
        "g = torch.Generator().manual_seed(5)\n"
        "out = pipe(batch_size=2, generator=g, num_inference_steps=6, output_type='np').images\n"
        f"torch.save((torch.tensor(out), pipe.scheduler.timesteps), {str(tmp_path / 'out.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    images, timesteps = torch.load(tmp_path / "out.pt")
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    offset = 1 if kind == "vp" else 0
    times = [*((float(t) + offset) / 1000 for t in timesteps), 0.0]
    out = sample(denoiser, x_init=x, solver="ddim" if kind == "vp" else "euler", times=times)
    expected = (out / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)
    assert float(images.std()) > 0.05


def test_one_step_students_become_folders_that_a_new_process_samples_from(tmp_path: Path) -> None:
    models: dict[str, FDistill] = {}
    for kind, (process, prediction, precondition, offset) in {
        "edm": ("edm", "edm", "edm", 0.0),
        "edm_labels": ("edm", "edm", "edm", 0.0),
        "vp": ("vp_linear", "v_prediction", "none", -1.0),
        "fm": ("fm", "flow", "none", 0.0),
    }.items():
        labels = {"num_class_embeds": 4} if kind == "edm_labels" else {}
        net, conditioning = UNet2D({**SMALL, **labels}, 1000.0, offset), Labels(3) if labels else None
        teacher = Denoiser(net, process, prediction, precondition, sigma_data=0.6, conditioning=conditioning)
        models[kind] = FDistill(teacher, seed=0).eval()
        to_one_step_pipeline(models[kind].student, tmp_path / kind)
    # A pipeline of consistency models takes one step unless told otherwise.
    one = {"num_inference_steps": 1}
    told = {"edm": {}, "edm_labels": {"class_labels": [2, 1]}, "vp": one, "fm": one}
    script = (
        "import torch, diffusers; from diffusers import DiffusionPipeline\n"
        f"for kind, told in {told!r}.items():\n"
        f"    pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r} + '/' + kind)\n"
        "    pipe.set_progress_bar_config(disable=True)\n"
        "    g = torch.Generator().manual_seed(5)\n"
        "    out = pipe(batch_size=2, generator=g, output_type='np', **told).images\n"
        f"    torch.save(torch.tensor(out), {str(tmp_path)!r} + '/' + kind + '.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    for kind, model in models.items():
        images = torch.load(tmp_path / f"{kind}.pt")
        cond = torch.tensor([2, 1]) if kind == "edm_labels" else None
        out = model.sample(2, cond, generator=torch.Generator().manual_seed(5))
        expected = (out / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)
        assert float(images.std()) > 0.05


def test_features_of_unets_and_dits_feed_a_discriminator() -> None:
    unet = Denoiser(UNet2D(dict(SMALL)), "edm", "edm", "edm")
    assert unet.sample_shape == [1, 8, 8]
    assert [x.shape for x in unet.features(torch.randn(2, 1, 8, 8), 1.0)] == [(2, 16, 4, 4)]
    config = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "num_layers": 2, "sample_size": 8,
        "patch_size": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 1, "out_channels": 2,
    }  # fmt: skip
    dit = Denoiser(DiT(config), "fm", "flow", conditioning=Labels(10))
    (tokens,) = dit.features(torch.randn(2, 1, 8, 8), 0.5, cond=torch.tensor([1, 2]))
    assert tokens.shape == (2, 16, 16)
    for denoiser, features in ((unet, "teacher"), (dit, "fake_score")):
        module = FDistill(denoiser, critics=Critics(discriminator_features=features), seed=0)
        assert module.discriminator is not None
        assert len(module.discriminator.heads) == 1


def test_exported_schedulers_do_not_clip() -> None:
    net = UNet2D(dict(SMALL))
    ddim = to_scheduler(Denoiser(net, "vp_cosine", "v_prediction"))
    assert not ddim.config.clip_sample
    assert not ddim.config.thresholding
    edm = to_scheduler(Denoiser(net, "edm", "edm", "edm", sigma_data=0.7))
    assert edm.config.sigma_data == 0.7
    with pytest.raises(ValueError, match=r"diffusers has no scheduler for VE.* with prediction 'x0'"):
        to_scheduler(Denoiser(net, "ve", "x0"))


def test_edm_models_of_diffusers_are_called_as_there() -> None:
    model = diffusers.UNet2DModel(**SMALL).eval()
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(4)
    denoiser = from_diffusers(model, scheduler)
    x = 80 * torch.randn(2, 1, 8, 8)
    expected = x
    with torch.no_grad():
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(expected, t)
            expected = scheduler.step(model(given, t).sample, t, expected).prev_sample
    out = sample(denoiser, x_init=x, solver="euler", times=scheduler.sigmas.double())
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def test_images_are_padded_and_times_reach_the_embedding() -> None:
    net = UNet2D(
        {
            **SMALL,
            "block_out_channels": (8, 8, 16),
            "down_block_types": ("DownBlock2D",) * 3,
            "up_block_types": ("UpBlock2D",) * 3,
        }
    )
    assert net(torch.randn(2, 1, 7, 6), torch.tensor([0.1, 0.5])).shape == (2, 1, 7, 6)
    t = torch.linspace(0, 1, 100)
    for scale, low, high in ((1000.0, 0.7, 1.0), (1.0, 0.0, 0.3)):
        varies = (net.model.time_proj(t * scale).std(0) > 0.1).float().mean()
        assert low <= float(varies) <= high


def test_dit_takes_labels_and_leaves_dropping_them_to_the_conditioning() -> None:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 1,
        "num_layers": 1,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
        "norm_num_groups": 1,
        "out_channels": 2,
    }
    net = DiT(config).train()
    x, t, labels = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 10])
    torch.nn.init.normal_(net.model.proj_out_2.weight)
    assert torch.equal(net(x, t, labels), net(x, t, labels))
    denoiser = from_diffusers(net.model, ddpm())
    assert isinstance(denoiser.conditioning, Labels)
    assert denoiser.conditioning.num_classes == 10
    with pytest.raises(ValueError, match="needs labels"):
        net(x, t)


def test_the_network_and_process_of_stable_diffusion_are_those_of_diffusers() -> None:
    theirs = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    torch.testing.assert_close(
        torch.tensor(scaled_linear_vp().alphas_cumprod), theirs.alphas_cumprod, rtol=1e-4, atol=1e-7
    )
    config = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1,
        "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 6,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    net = UNet2DCondition(config)
    x, words = torch.randn(2, 1, 8, 8), torch.randn(2, 5, 6)
    expected = net.model(x, torch.tensor([499.0, 99.0]), encoder_hidden_states=words).sample
    denoiser = Denoiser(net, scaled_linear_vp(), "epsilon", conditioning=Sequences(5, 6))
    torch.testing.assert_close(denoiser(x, torch.tensor([0.5, 0.1]), words), expected)
    assert denoiser.features(x, 0.5, cond=words)[0].shape == (2, 16, 4, 4)
    with pytest.raises(ValueError, match="UNet2DConditionModel needs sequences"):
        net(x, torch.ones(2))
    with pytest.raises(ValueError, match="beta_start and beta_end must be"):
        scaled_linear_vp(0.5, 0.1)


def test_second_times_reach_a_unet_and_meanflow_learns_with_it() -> None:
    net = UNet2D({**SMALL, "class_embed_type": "timestep"}, time_scale=1.0)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.5])
    near, far = net(x, t, s=t), net(x, t, s=t - 0.4)
    assert not torch.equal(near, far)
    # Attention of UNet2DModel has no forward-mode derivative: without it, and by finite differences, all is well.
    plain = UNet2D({**SMALL, "class_embed_type": "timestep", "add_attention": False}, time_scale=1.0)
    for network, jvp in ((plain, "forward"), (net, "finite_difference")):
        loss = FlowMap(network, "meanflow", jvp=jvp, seed=0).loss(x, generator=torch.Generator().manual_seed(0))
        assert loss.isfinite()
    with pytest.raises(RuntimeError, match='choose jvp="finite_difference"'):
        FlowMap(net, "meanflow").loss(x)
    with pytest.raises(ValueError, match="takes labels or a second time, not both"):
        net(x, t, torch.tensor([0, 1]), t)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda f: UNet2D(dict(SMALL), time_scale=0.0), "time_scale must be > 0"),
        (lambda f: from_diffusers(diffusers.UNet2DModel(**SMALL)), "scheduler must be given with a model"),
        (lambda f: from_diffusers(torch.nn.Linear(1, 1), ddpm()), "source must be a UNet2DModel"),
        (lambda f: to_pipeline(Denoiser(torch.nn.Linear(1, 1)), f), "denoiser must have a UNet2D without"),
        (
            lambda f: FDistill(Denoiser(UNet2D(dict(SMALL), 1.0), "edm", "edm", "edm")).to_pipeline(f),
            "time_scale and time_offset of UNet2D must be 1000 and 0",
        ),
        (
            lambda f: FDistill(Denoiser(UNet2D(dict(SMALL)), "edm", "x0"), student_times=[80.0, 1.0]).to_pipeline(f),
            "student_times must be one time",
        ),
        (
            lambda f: FDistill(Denoiser(TimeMLP([1, 8, 8]), "edm", "edm", "edm")).to_pipeline(f),
            "denoiser must have a UNet2D without conditioning, or with Labels",
        ),
        (
            lambda f: to_pipeline(Denoiser(UNet2D(dict(SMALL)), "vp_linear", "epsilon"), f),
            "time_scale and time_offset of UNet2D must be 1000 and -1",
        ),
    ],
)
def test_bad_arguments(build, message: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        build(tmp_path)
