"""SSO in a module that knows nothing of it."""

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_methods.optim import SSO


class TargetCapture(Callback):
    """Show the module's :class:`~lit_methods.optim.SSO` the targets: the outputs of one of its submodules.

    With it, SSO goes into any module with automatic optimization as an injected optimizer, also from a YAML file, where
    an optimizer cannot name the network; ``training_step`` stays what it is.

    Args:
        module: name of the submodule, for example ``"network"``; ``""`` for the module itself.

    Raises:
        ValueError: in ``fit``: there is no SSO without a ``target_module``, or no such submodule.
    """

    def __init__(self, module: str = "network") -> None:
        self.module = module

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Connect optimizer and submodule."""
        optimizers = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, SSO)]
        if not optimizers:
            kinds = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise ValueError(f"TargetCapture needs a module whose optimizer is an SSO, got {kinds}")
        try:
            target_module = pl_module.get_submodule(self.module)
        except AttributeError:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(f"module={self.module!r} is no submodule of {type(pl_module).__name__}: {names}") from None
        for optimizer in optimizers:
            optimizer.capture(target_module)
