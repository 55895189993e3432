"""Cases of the family: games."""

import torch

from lit_methods.callbacks import SmallGainCertification
from lit_methods.games import GameModule, MatrixGame, PreferenceGame, QuadraticGame, RingGAN
from lit_methods.optim import PseudoGradientRK4
from tests.contract.cases.kinds import CallbackCase, ModuleCase, OptimizerCase, RecipeCase, class_config

_ROCK_PAPER_SCISSORS = [[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]]

_TOY = {"own": [[[1.0]], [[1.0]]], "coupling": [[None, [[10.0]]], [[[0.05]], None]]}

OPTIMIZERS: dict[str, OptimizerCase] = {
    "lit_methods.optim.PseudoGradientRK4": OptimizerCase(
        PseudoGradientRK4, {"lr": 0.5}, bad=[({"lr": -1.0}, "lr must be")], closure_calls=4, host_syncs=True
    ),
}

CALLBACKS: dict[str, CallbackCase] = {
    "lit_methods.callbacks.SmallGainCertification": CallbackCase(
        make=SmallGainCertification,
        bad=[
            (lambda: SmallGainCertification(radius=0.0), "radius must be"),
            (lambda: SmallGainCertification(sampling="grid"), "sampling must be"),
            (lambda: SmallGainCertification(num_points=0), "num_points must be"),
            (lambda: SmallGainCertification(objective="speed"), "objective must be"),
            (lambda: SmallGainCertification(inflation=-1.0), "inflation must be"),
        ],
        not_applicable={
            name: "It refuses a module without losses of blocks; tests/unit/games does it with games."
            for name in (
                "check_attaches_to_an_unrelated_module",
                "check_works_beside_averages_of_weights",
                "check_state_survives_a_checkpoint",
            )
        },
    ),
}

RECIPES: dict[str, RecipeCase] = {
    f"small_gain_nash/{name}": RecipeCase(["--model.rounds=3", "--trainer.max_epochs=2"])
    for name in ("toy", "lq", "markov")
}

MODULES: dict[str, ModuleCase] = {
    "lit_methods.games.GameModule": ModuleCase(
        config={
            "model": class_config(
                "lit_methods.games.GameModule",
                game=class_config("lit_methods.games.QuadraticGame", **_TOY),
                start=[[0.15], [-0.15]],
                equilibrium=[[0.0], [0.0]],
            )
        },
        make=lambda: GameModule(QuadraticGame(**_TOY), [[0.15], [-0.15]]),  # type: ignore[arg-type]
        forward_inputs=tuple,
        bad=[
            (lambda: GameModule(QuadraticGame.toy(), [[0.1]]), "start must have"),
            (lambda: GameModule(QuadraticGame.toy(), [[0.1]] * 2, rounds=0), "rounds must be"),
            (lambda: GameModule(QuadraticGame.toy(), [[0.1]] * 2, geometry="flat"), "geometry must be"),
        ],
        not_applicable={
            "check_runs_through_the_cli": "A game has nothing to validate or test; its recipes run fit.",
        },
    ),
    "lit_methods.games.PreferenceGame": ModuleCase(
        may_be_infinite=frozenset({"eta"}),
        config={"model": class_config("lit_methods.games.PreferenceGame", preferences=_ROCK_PAPER_SCISSORS)},
        make=lambda: PreferenceGame(_ROCK_PAPER_SCISSORS),
        forward_inputs=tuple,
        bad=[(lambda: PreferenceGame(_ROCK_PAPER_SCISSORS, beta=0.0), "beta must be > 0")],
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
