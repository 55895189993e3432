"""Whether weights keep their signs during training, and whether they become log-normal."""

import re
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class DaleMonitor(Callback):
    """Count weights that changed sign or died, and compare the weights' magnitudes with a log-normal distribution.

    At the end of every few epochs logs, over all watched weights together:

    - ``dale/sign_flips``: weights whose sign is the opposite of what it was when training began; must be 0 under
      :class:`~lit_methods.optim.ExponentiatedGradient` and its relatives;
    - ``dale/dead``: weights that were not 0 when training began and are now: a multiplicative step never moves them;
    - ``dale/skew``, ``dale/kurtosis``: of ``log |w|``, standardised third and excess fourth moment, 0 if log-normal;
    - ``dale/ks``: largest distance of the distribution function of ``log |w|`` to the normal one of the same mean and
      variance, in [0, 1].

    The values are also in ``history``. Cost: a byte per weight, in checkpoints too, and a sort per measurement. Sharded
    parameters (FSDP2) are gathered, one at a time.

    Args:
        pattern: regular expression that the names of watched parameters contain; None: all trainable ones that no
            group of an optimizer treats by plain descent (``algorithm="gd"``).
        every_n_epochs: >= 1; the first epoch counts.

    Attributes:
        history: one dict per measurement: ``step`` and the five values.

    Raises:
        ValueError: an argument out of range, or when training begins: no parameter is watched.
    """

    def __init__(self, pattern: str | None = None, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be >= 1, got {every_n_epochs}")
        try:
            self.pattern = None if pattern is None else re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern must be a regular expression, got {pattern!r}: {error}") from error
        self.every_n_epochs = every_n_epochs
        self.history: list[dict[str, Any]] = []
        self._signs: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """The measurements so far, and the signs of the beginning."""
        return {"history": list(self.history), "signs": dict(self._signs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint."""
        self.history, self._signs = list(state_dict["history"]), dict(state_dict["signs"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the signs, unless a checkpoint brought them."""
        if not self._signs:
            self._signs = {name: p.sign().to("cpu", torch.int8) for name, p in self._watched(trainer, pl_module)}
        if not self._signs:
            raise ValueError(f"pattern must match a trainable parameter, got {self.pattern and self.pattern.pattern!r}")

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        if trainer.current_epoch % self.every_n_epochs:
            return
        flips, dead, logs = 0, 0, []
        for name, p in self._watched(trainer, pl_module):
            if name not in self._signs:  # joined after the beginning
                self._signs[name] = p.sign().to("cpu", torch.int8)
            before, now = self._signs[name].to(p.device), p.sign()
            flips += int((before * now < 0).sum())
            dead += int(((before != 0) & (now == 0)).sum())
            logs.append(p[p != 0].abs().double().log().cpu())
        values = {"sign_flips": float(flips), "dead": float(dead), **_normality(torch.cat(logs))}
        self.history.append({"step": trainer.global_step, **values})
        pl_module.log_dict({f"dale/{name}": value for name, value in values.items()}, rank_zero_only=True)

    def _watched(self, trainer: Trainer, pl_module: LightningModule) -> list[tuple[str, Tensor]]:
        """Names and whole values."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        descended = {id(p) for group in groups if group.get("algorithm") == "gd" for p in group["params"]}
        return [
            (name, getattr(p.detach(), "full_tensor", p.detach)())
            for name, p in pl_module.named_parameters()
            if (p.requires_grad and id(p) not in descended if self.pattern is None else self.pattern.search(name))
        ]


def _normality(logs: Tensor) -> dict[str, float]:
    """Skew, excess kurtosis, and Kolmogorov-Smirnov distance to the normal distribution; NaN where undefined."""
    if len(logs) == 0:
        return dict.fromkeys(("skew", "kurtosis", "ks"), float("nan"))
    z, _ = ((logs - logs.mean()) / logs.std(correction=0)).sort()
    excess = torch.special.ndtr(z) - torch.arange(len(z), dtype=z.dtype) / len(z)
    ks = torch.maximum(excess, 1 / len(z) - excess).max()
    return {"skew": float(z.pow(3).mean()), "kurtosis": float(z.pow(4).mean() - 3), "ks": float(ks)}
