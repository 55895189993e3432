"""Cases of the family: diffusion."""

import torch

from lit_methods.callbacks import SubmoduleEMA
from lit_methods.datamodules import Mixture2DDataModule
from lit_methods.diffusion import Diffusion, Labels, MinSNR, Sampling, TimeMLP
from tests.contract.cases.kinds import ADAM, LOADER_ARGUMENTS, CallbackCase, DataModuleCase, ModuleCase, class_config

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
}


CALLBACKS: dict[str, CallbackCase] = {
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
