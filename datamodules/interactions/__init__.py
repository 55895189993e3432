"""Users' interactions with items."""

from lit_methods.datamodules.interactions.datamodule import InteractionsDataModule
from lit_methods.datamodules.interactions.published_sets import (
    MovieLensDataModule,
    MSDTasteProfileDataModule,
    NetflixPrizeDataModule,
)

__all__ = ["InteractionsDataModule", "MSDTasteProfileDataModule", "MovieLensDataModule", "NetflixPrizeDataModule"]
