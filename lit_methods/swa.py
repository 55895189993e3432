"""Stochastic weight averaging of modules whose layers are made late."""

from copy import deepcopy

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging


def renew_swa_copy(module: LightningModule) -> None:
    """Give ``StochasticWeightAveraging`` a copy of the module that has all its layers.

    Call it at the end of a ``configure_model`` that made some. Lightning 2.6 copies the module before, so that it would
    average what was there then: nothing, without a word.

    Args:
        module: with its layers.
    """
    trainer = getattr(module, "_trainer", None)
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, StochasticWeightAveraging):
            callback._average_model = deepcopy(module)
