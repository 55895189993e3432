"""Cases of the family: diffusion."""

import torch

from lit_methods.callbacks import (
    ConsistencySchedule,
    LikelihoodEvaluation,
    RestorationGrid,
    SampleGrid,
    SampleQuality,
    SubmoduleEMA,
)
from lit_methods.datamodules import Mixture2DDataModule
from lit_methods.diffusion import (
    CTM,
    SCM,
    Consistency,
    Denoiser,
    Diffusion,
    FlowMap,
    Labels,
    MeanFlow,
    MinSNR,
    Sampling,
    TimeMLP,
)
from lit_methods.metrics import NearestDistance, SlicedWasserstein
from tests.contract.cases.kinds import (
    ADAM,
    LOADER_ARGUMENTS,
    TINY,
    CallbackCase,
    DataModuleCase,
    ModuleCase,
    RecipeCase,
    class_config,
)

_NET = class_config("lit_methods.diffusion.TimeMLP", shape=[1, 8, 8], width=16, num_classes=10)
_LABELS = class_config("lit_methods.diffusion.Labels", num_classes=10)
_DIGITS = class_config("lit_methods.datamodules.DigitsDataModule", batch_size=32)

MODULES: dict[str, ModuleCase] = {
    "lit_methods.diffusion.Diffusion": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.diffusion.Diffusion",
                net=_NET,
                process="vp_cosine",
                prediction="v_prediction",
                weighting=class_config("lit_methods.diffusion.MinSNR", gamma=4.0),
                time_sampler="uniform",
                conditioning=_LABELS,
                sampling={"solver": "sde_dpmpp_2m", "steps": 2, "guidance": 2.0},
                optimizer=ADAM,
                lr_scheduler=class_config("torch.optim.lr_scheduler.StepLR", step_size=2),
            ),
            "data": _DIGITS,
        },
        make=lambda: Diffusion(TimeMLP([2], width=8), sampling=Sampling(steps=2)),
        forward_inputs=lambda: (torch.ones(3, 2), torch.tensor([0.1, 0.5, 0.9])),
        bad=[
            (lambda: Diffusion(TimeMLP([2]), process="ddpm"), "process must be one of"),
            (lambda: Diffusion(TimeMLP([2]), prediction="noise"), "prediction must be one of"),
            (lambda: Diffusion(TimeMLP([2]), prediction="epsilon"), "prediction must be x0, flow, v_prediction or edm"),
            (lambda: Diffusion(TimeMLP([2]), precondition="ve"), "precondition must be one of"),
            (lambda: Diffusion(TimeMLP([2]), sigma_data=-1.0), "sigma_data must be"),
            (lambda: Diffusion(TimeMLP([2]), weighting="snr5"), "weighting must be one of"),
            (lambda: Diffusion(TimeMLP([2]), weighting=MinSNR(-1.0)), "gamma must be"),
            (lambda: Diffusion(TimeMLP([2]), time_sampler="beta"), "time_sampler must be one of"),
            (lambda: Diffusion(TimeMLP([2]), conditioning=Labels(0)), "num_classes must be"),
            (lambda: Diffusion(TimeMLP([2]), clip_x0=(1.0, 0.0)), "clip_x0 must be"),
            (lambda: Diffusion(TimeMLP([2]), seed=-1), "seed must be"),
        ],
    ),
    "lit_methods.diffusion.FlowMap": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.diffusion.FlowMap",
                net=class_config(
                    "lit_methods.diffusion.TimeMLP", shape=[1, 8, 8], width=16, num_classes=10, two_times=True
                ),
                objective=class_config("lit_methods.diffusion.MeanFlow", guidance=[0.5, 0.4]),
                conditioning=_LABELS,
                steps=2,
                optimizer=ADAM,
            ),
            "data": _DIGITS,
        },
        make=lambda: FlowMap(TimeMLP([2], width=8), "scm"),
        forward_inputs=lambda: (torch.ones(3, 2), torch.tensor([0.1, 0.5, 0.9])),
        bad=[
            (lambda: FlowMap(TimeMLP([2]), "shortcut"), "objective must be one of"),
            (lambda: FlowMap(TimeMLP([2]), jvp="backward"), "jvp must be"),
            (lambda: FlowMap(TimeMLP([2]), steps=0), "steps must be"),
            (lambda: FlowMap(TimeMLP([2]), sigma_data=0.0), "sigma_data must be"),
            (lambda: FlowMap(TimeMLP([2]), teacher=Denoiser(TimeMLP([2]))), "teacher must be None for MeanFlow"),
            (lambda: MeanFlow(different=2.0), "different must be"),
            (lambda: MeanFlow(power=-1.0), "power must be"),
            (lambda: MeanFlow(offset=0.0), "offset must be"),
            (lambda: Consistency(base=1.0), "base must be"),
            (lambda: Consistency(closest=0.0), "closest must be"),
            (lambda: Consistency(offset=0.0), "offset must be"),
            (lambda: SCM(warmup=-1), "warmup must be"),
            (lambda: SCM(offset=0.0), "offset must be"),
            (lambda: CTM(denoising=0.0), "denoising must be"),
        ],
    ),
}


_NEEDS_SAMPLES = "It needs a module that makes samples; its unit tests attach it to Diffusion."
_KEEPS_NOTHING = "It keeps nothing between steps: what it does depends on the step only."

CALLBACKS: dict[str, CallbackCase] = {
    "lit_methods.callbacks.ConsistencySchedule": CallbackCase(
        lambda: ConsistencySchedule(5),
        bad=[(lambda: ConsistencySchedule(0), "every_n_steps must be")],
        not_applicable={
            "check_attaches_to_an_unrelated_module": "It needs a FlowMap and refuses every other module by name.",
            "check_state_survives_a_checkpoint": _KEEPS_NOTHING,
        },
    ),
    "lit_methods.callbacks.LikelihoodEvaluation": CallbackCase(
        LikelihoodEvaluation,
        bad=[
            (lambda: LikelihoodEvaluation(steps=0), "steps must be"),
            (lambda: LikelihoodEvaluation(probes=0), "probes must be"),
            (lambda: LikelihoodEvaluation(levels=1), "levels must be"),
            (lambda: LikelihoodEvaluation(value_range=(1.0, 0.0)), "value_range must be"),
            (lambda: LikelihoodEvaluation(seed=-1), "seed must be"),
        ],
        not_applicable={"check_state_survives_a_checkpoint": _KEEPS_NOTHING},
    ),
    "lit_methods.callbacks.RestorationGrid": CallbackCase(
        RestorationGrid,
        bad=[
            (lambda: RestorationGrid(num_images=0), "num_images must be"),
            (lambda: RestorationGrid(scale=0.0), "scale must be"),
            (lambda: RestorationGrid(steps=0), "steps must be"),
            (lambda: RestorationGrid(factor=1), "factor must be"),
            (lambda: RestorationGrid(seed=-1), "seed must be"),
        ],
        not_applicable={"check_state_survives_a_checkpoint": _KEEPS_NOTHING},
    ),
    "lit_methods.callbacks.SampleGrid": CallbackCase(
        SampleGrid,
        bad=[
            (lambda: SampleGrid(num_samples=0), "num_samples must be"),
            (lambda: SampleGrid(num_classes=-1), "num_classes must be"),
            (lambda: SampleGrid(trajectory=-1), "trajectory must be"),
            (lambda: SampleGrid(every_n_epochs=0), "every_n_epochs must be"),
            (lambda: SampleGrid(name="a/b"), "name must be"),
            (lambda: SampleGrid(seed=-1), "seed must be"),
        ],
        not_applicable={
            "check_attaches_to_an_unrelated_module": _NEEDS_SAMPLES,
            "check_state_survives_a_checkpoint": _KEEPS_NOTHING,
        },
    ),
    "lit_methods.callbacks.SampleQuality": CallbackCase(
        lambda: SampleQuality({"distance": SlicedWasserstein()}),
        bad=[
            (lambda: SampleQuality(), "metrics or train_metrics must name"),
            (lambda: SampleQuality(train_metrics={"near": NearestDistance()}, every_n_epochs=0), "every_n_epochs must"),
            (lambda: SampleQuality({"near": NearestDistance()}, seed=-1), "seed must be"),
        ],
        not_applicable={
            "check_attaches_to_an_unrelated_module": _NEEDS_SAMPLES,
            "check_state_survives_a_checkpoint": _KEEPS_NOTHING,
        },
    ),
    "lit_methods.callbacks.SubmoduleEMA": CallbackCase(
        lambda: SubmoduleEMA("layer", decays=[0.9, 0.99]),
        bad=[
            (lambda: SubmoduleEMA(decays=[]), "decays must be"),
            (lambda: SubmoduleEMA(decays=[1.0]), "decays must be"),
            (lambda: SubmoduleEMA(decays=[-1.0], schedule="power"), "decays must be"),
            (lambda: SubmoduleEMA(evaluate=1), "evaluate must be"),
            (lambda: SubmoduleEMA(start_step=-1), "start_step must be"),
            (lambda: SubmoduleEMA(schedule="cosine"), "schedule must be"),
        ],
    ),
}


DATAMODULES: dict[str, DataModuleCase] = {
    "lit_methods.datamodules.Mixture2DDataModule": DataModuleCase(
        lambda folder, **arguments: Mixture2DDataModule(**({"batch_size": 16} | arguments)),
        bad=[
            *LOADER_ARGUMENTS,
            ({"modes": 0}, "modes=0: must be"),
            ({"radius": -1.0}, "radius=-1.0: must be"),
            ({"std": 0.0}, "std=0.0: must be"),
            ({"train_size": 0}, "train_size=0: must be"),
            ({"test_size": -1}, "test_size=-1: must be"),
        ],
    ),
}


_ONE_JUMP = {"SampleQuality": {"variants": {"one": {"steps": 1}}}}
_OFTEN = [*TINY, "--trainer.check_val_every_n_epoch=1"]

RECIPES: dict[str, RecipeCase] = {
    "diffusion_principles/conversions": RecipeCase(
        _OFTEN, callbacks={"SampleQuality": {"variants": {"edm": {"process": "edm", "steps": 2}}}}
    ),
    "diffusion_principles/digits_consistency": RecipeCase(_OFTEN, callbacks=_ONE_JUMP),
    "diffusion_principles/digits_flow": RecipeCase(
        _OFTEN, callbacks={"SampleQuality": {"variants": {"one": {"steps": 2}}}, "RestorationGrid": {"steps": 2}}
    ),
    "diffusion_principles/digits_meanflow": RecipeCase(_OFTEN, callbacks=_ONE_JUMP),
    "diffusion_principles/mixture2d": RecipeCase(
        [*_OFTEN, "--data.train_size=512", "--data.test_size=32", "--model.sampling.steps=2"],
        callbacks={"LikelihoodEvaluation": {"steps": 2}},
    ),
}
