"""Cases of the family: vi."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from lit_methods.batches import InteractionBatch
from lit_methods.datamodules import (
    InteractionsDataModule,
    MovieLensDataModule,
    MSDTasteProfileDataModule,
    NetflixPrizeDataModule,
)
from lit_methods.vi import MultDAE, MultVAE
from tests.contract.cases.kinds import (
    LOADER_ARGUMENTS,
    TINY,
    Arguments,
    DataModuleCase,
    ModuleCase,
    RecipeCase,
    class_config,
)
from tests.standins.interaction_files import write_msd, write_netflix, write_u_data

_MOVIES = class_config(
    "lit_methods.datamodules.MovieLensDataModule", version="100k", data_dir=".", num_heldout_users=10, batch_size=8
)

_AUTOENCODER_ARGUMENTS: list[tuple[Arguments, str]] = [
    ({"num_items": 0}, "num_items must be"),
    ({"hidden_dims": (0,)}, "hidden_dims must hold"),
    ({"latent_dim": 0}, "latent_dim must be"),
    ({"dropout": 1.0}, "dropout must be"),
    ({"likelihood": "poisson"}, "likelihood must be"),
    ({"positive_weight": 0.0}, "positive_weight must be"),
    ({"recall_at": (0,)}, "recall_at must hold"),
    ({"ndcg_at": (5, 5)}, "ndcg_at must hold"),
    ({"recall_at": (), "ndcg_at": ()}, "must not both be empty"),
    ({"num_recommendations": 0}, "num_recommendations must be"),
]


def _history() -> tuple[Any, ...]:
    nothing = torch.zeros(4, dtype=torch.int64)
    return (InteractionBatch(torch.tensor([0, 4, 2]), torch.tensor([0, 2, 2, 3]), None, nothing[:0], nothing),)


_FEW_USERS = {"num_heldout_users": 10, "min_user_interactions": 5, "batch_size": 8}


def _interactions(
    datamodule: Callable[..., LightningDataModule], write: Callable[[Path], None], folder: Path, **arguments: Any
) -> LightningDataModule:
    if not any(folder.iterdir()):
        write(folder)
    return datamodule(**({"data_dir": str(folder), "cache_dir": str(folder / "cache"), **_FEW_USERS} | arguments))


def _own_interactions(folder: Path, **arguments: Any) -> LightningDataModule:
    if not any(folder.iterdir()):
        write_u_data(folder)
        (folder / "own.tsv").write_text("user_id\titem_id\trating\ttime\n" + (folder / "u.data").read_text())
    return InteractionsDataModule(str(folder / "own.tsv"), **({"delimiter": "\t", **_FEW_USERS} | arguments))


_INTERACTIONS_ARGUMENTS: list[tuple[Arguments, str]] = [
    *LOADER_ARGUMENTS[:3],
    ({"eval_batch_size": 0}, "eval_batch_size=0: must be"),
    ({"min_user_interactions": 0}, "min_user_interactions=0: must be"),
    ({"min_item_interactions": -1}, "min_item_interactions=-1: must be"),
    ({"num_heldout_users": 0}, "num_heldout_users=0: must be"),
    ({"target_fraction": 1.0}, "target_fraction=1.0: must be"),
    ({"split_seed": -1}, "split_seed=-1: must be"),
]

_TINY_MOVIES = [*TINY, "--data.data_dir=.", "--data.num_heldout_users=10", "--data.batch_size=8"]

MODULES: dict[str, ModuleCase] = {
    "lit_methods.vi.MultVAE": ModuleCase(
        config={
            "model": class_config("lit_methods.vi.MultVAE", hidden_dims=[8], latent_dim=4, total_anneal_steps=10),
            "data": _MOVIES,
        },
        make=lambda: MultVAE(6, hidden_dims=(8,), latent_dim=4),
        forward_inputs=_history,
        bad=[
            (partial(MultVAE, **({"num_items": 6} | arguments)), message)
            for arguments, message in [*_AUTOENCODER_ARGUMENTS, ({"anneal_cap": -0.1}, "anneal_cap must be")]
        ],
        prepare=write_u_data,
    ),
    "lit_methods.vi.MultDAE": ModuleCase(
        config={"model": class_config("lit_methods.vi.MultDAE", latent_dim=4), "data": _MOVIES},
        make=lambda: MultDAE(6, latent_dim=4),
        forward_inputs=_history,
        bad=[
            (partial(MultDAE, **({"num_items": 6} | arguments)), message)
            for arguments, message in [*_AUTOENCODER_ARGUMENTS, ({"l2_penalty": -0.1}, "l2_penalty must be")]
        ],
        prepare=write_u_data,
    ),
}


DATAMODULES: dict[str, DataModuleCase] = {
    "lit_methods.datamodules.InteractionsDataModule": DataModuleCase(_own_interactions, bad=_INTERACTIONS_ARGUMENTS),
    "lit_methods.datamodules.MovieLensDataModule": DataModuleCase(
        partial(_interactions, MovieLensDataModule, write_u_data, version="100k"),
        bad=[*_INTERACTIONS_ARGUMENTS, ({"version": "2m"}, "version='2m': must be one of 100k")],
    ),
    "lit_methods.datamodules.NetflixPrizeDataModule": DataModuleCase(
        partial(_interactions, NetflixPrizeDataModule, write_netflix), bad=_INTERACTIONS_ARGUMENTS
    ),
    "lit_methods.datamodules.MSDTasteProfileDataModule": DataModuleCase(
        partial(_interactions, MSDTasteProfileDataModule, write_msd, min_item_interactions=2),
        bad=_INTERACTIONS_ARGUMENTS,
    ),
}


RECIPES: dict[str, RecipeCase] = {
    "mult_vae/ml100k": RecipeCase(_TINY_MOVIES, prepare=write_u_data),
    "mult_vae/ml100k_dae": RecipeCase(_TINY_MOVIES, prepare=write_u_data),
}
