"""Certify a game before it is played, and choose the step from the certificate."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_methods.callbacks.figures import output_dir


class SmallGainCertification(Callback):
    """Computes a small-gain certificate when ``fit`` starts, for modules with ``losses(*blocks)`` and ``blocks()``.

    The certificate goes to ``small_gain_certificate.json`` in the log folder and as ``sgn/...`` to the loggers; a
    :class:`~lit_methods.games.GameModule` gets its weights. Nothing else of the training changes, unless ``set_lr``. A
    resumed run keeps the certificate of its checkpoint.

    Args:
        radius: half the side of the box around ``blocks()`` that is certified, > 0.
        sampling: points of the box: ``"vertices"``, ``"sobol"`` or ``"uniform"``.
        num_points: how many Sobol or uniform points, >= 1.
        objective: what the weights maximise: ``"margin"``, ``"euler"`` (margin / beta^2) or ``"rk4"`` (margin / beta).
        inflation: share added to sampled couplings and taken from curvatures, >= 0.
        set_lr: set the learning rate of all groups: the certified Runge-Kutta step for
            :class:`~lit_methods.optim.PseudoGradientRK4`, else half the longest certified Euler step.
        strict: raise instead of warning when nothing is certified.

    Attributes:
        certificate: the :class:`~lit_methods.games.SmallGainCertificate`, after ``fit`` has started.

    Raises:
        ValueError: an argument out of range; in ``fit``: learning rates that differ between players with ``set_lr``, or
            with ``strict`` a game that is not certified.
        TypeError: in ``fit``: a module without losses of blocks.
    """

    def __init__(
        self,
        radius: float = 0.1,
        sampling: str = "vertices",
        num_points: int = 256,
        objective: str = "margin",
        inflation: float = 0.0,
        set_lr: bool = False,
        strict: bool = False,
    ) -> None:
        if not 0 < radius < float("inf"):
            raise ValueError(f"radius must be > 0 and finite, got {radius}")
        if sampling not in ("vertices", "sobol", "uniform"):
            raise ValueError(f"sampling must be one of 'vertices', 'sobol', 'uniform', got {sampling!r}")
        if num_points < 1:
            raise ValueError(f"num_points must be >= 1, got {num_points}")
        if objective not in ("margin", "euler", "rk4"):
            raise ValueError(f"objective must be one of 'margin', 'euler', 'rk4', got {objective!r}")
        if not 0 <= inflation < float("inf"):
            raise ValueError(f"inflation must be >= 0 and finite, got {inflation}")
        self.radius = radius
        self.sampling = sampling
        self.num_points = num_points
        self.objective = objective
        self.inflation = inflation
        self.set_lr = set_lr
        self.strict = strict
        self.certificate: Any = None

    def state_dict(self) -> dict[str, Any]:
        """The certificate as plain data."""
        return {} if self.certificate is None else {"certificate": self.certificate.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the certificate of a checkpoint."""
        from lit_methods.games import SmallGainCertificate

        found = state_dict.get("certificate")
        self.certificate = None if found is None else SmallGainCertificate.from_dict(found)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Certify, log, and set weights and the learning rate."""
        from lit_methods.games import DifferentiableGame, GameModule, certify
        from lit_methods.games.small_gain.bounds import warn_uncertified
        from lit_methods.optim import PseudoGradientRK4

        if not (isinstance(pl_module, DifferentiableGame) and hasattr(pl_module, "blocks")):
            raise TypeError(f"the module must have losses(*blocks) and blocks(), got {type(pl_module).__name__}")
        if self.certificate is not None:
            return  # of the checkpoint, as its learning rate and weights are
        module: Any = pl_module
        natural = getattr(module, "geometry", "euclidean") == "natural"
        certificate = certify(
            getattr(module, "game", module), module.blocks(), self.radius, sampling=self.sampling,
            num_points=self.num_points, objective=self.objective, inflation=self.inflation,
            metric=module.game.fisher_metric if natural else None,
        )  # fmt: skip
        self.certificate = certificate
        if self.strict and not certificate.certified:
            raise ValueError(f"the game is not certified: margin {certificate.margin:.4g}. {certificate.hint}")
        warn_uncertified(certificate)
        if isinstance(module, GameModule):
            module.weights.copy_(certificate.weights)
        if self.set_lr and certificate.certified:
            for optimizer in trainer.optimizers:
                rates = [group["lr"] for group in optimizer.param_groups]
                if len(set(rates)) > 1:
                    raise ValueError(f"set_lr must be False for players with unequal learning rates, got {rates}")
                rk4 = isinstance(optimizer, PseudoGradientRK4)
                for group in optimizer.param_groups:
                    group["lr"] = certificate.rk4_step_certified if rk4 else certificate.euler_step
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        plain = self.certificate.to_dict()
        numbers = {f"sgn/{name}": float(value) for name, value in plain.items() if isinstance(value, bool | float)}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
        folder = output_dir(trainer)  # a collective call
        if trainer.is_global_zero:
            text = json.dumps(plain, indent=1, allow_nan=False) + "\n"
            Path(folder, "small_gain_certificate.json").write_text(text)
