"""Cases of the family: games."""

import torch

from lit_methods.games import MatrixGame, PreferenceGame, RingGAN
from tests.contract.cases.kinds import ModuleCase, class_config

_ROCK_PAPER_SCISSORS = [[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]]

MODULES: dict[str, ModuleCase] = {
    "lit_methods.games.PreferenceGame": ModuleCase(
        may_be_infinite=frozenset({"eta"}),
        config={"model": class_config("lit_methods.games.PreferenceGame", preferences=_ROCK_PAPER_SCISSORS)},
        make=lambda: PreferenceGame(_ROCK_PAPER_SCISSORS),
        forward_inputs=tuple,
        bad=[(lambda: PreferenceGame(_ROCK_PAPER_SCISSORS, beta=0.0), "beta=0.0 must be")],
        not_applicable={
            "check_compiles": "It has no forward.",
            "check_runs_through_the_cli": "A game has nothing to validate or test; its recipe runs fit.",
            "check_checkpoint_rebuilds_the_module": "max_steps never ends the run; tests/unit/games does it.",
            "check_ranks_stay_identical_under_ddp": "It has no trained parameters, which DDP requires.",
            "check_runs_finite_in_mixed_bfloat16": "It has no parameters; its iterates are float64 by design.",
            "check_logs_without_warnings": "Without optimizer steps max_steps never ends the run.",
        },
    ),
    "lit_methods.games.MatrixGame": ModuleCase(
        config={"model": class_config("lit_methods.games.MatrixGame", payoff=[[1.0, 0.5], [0.0, 1.0]])},
        make=lambda: MatrixGame([[1.0, 0.5], [0.0, 1.0]]),
        forward_inputs=tuple,
        bad=[
            (lambda: MatrixGame([[]]), "payoff must be"),
            (lambda: MatrixGame([[1.0]], rounds=0), "rounds must be"),
            (lambda: MatrixGame([[1.0]], x=[1.0, 2.0]), "x must have 1 entries"),
            (lambda: MatrixGame([[1.0]], mixed=True, y=[0.5]), "y must be a probability vector"),
        ],
        not_applicable={
            "check_runs_through_the_cli": "A game has nothing to validate or test; its recipes run fit.",
        },
    ),
    "lit_methods.games.RingGAN": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.games.RingGAN",
                hidden_features=[8],
                batch_size=16,
                steps_per_epoch=8,
                optimizer=class_config("lit_methods.optim.ExtraAdam", lr=1e-3),
            )
        },
        make=lambda: RingGAN(hidden_features=(8,)),
        forward_inputs=lambda: (torch.ones(2, 16),),
        bad=[
            (lambda: RingGAN(modes=0), "modes must be"),
            (lambda: RingGAN(latent_dim=0), "latent_dim must be"),
            (lambda: RingGAN(batch_size=0), "batch_size must be"),
            (lambda: RingGAN(steps_per_epoch=0), "steps_per_epoch must be"),
            (lambda: RingGAN(std=0.0), "std must be"),
        ],
    ),
}
