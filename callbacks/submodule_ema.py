"""Running averages of a part of a module's weights."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class SubmoduleEMA(Callback):
    """Average the weights of one part of a module, with several decays at once, and evaluate with an average.

    Lightning's ``EMAWeightAveraging`` copies the whole module (teachers, critics, metrics), averages buffers unless
    told not to, counts the steps of all optimizers, and tests with raw weights. This one averages the parameters of
    ``target`` only, once whenever an optimizer has changed them, by one fused operation. Buffers are never averaged.

    Validation during ``fit`` sees the average, and so does everything after training: ``trainer.test``,
    ``trainer.predict``, your own use of the module. In a checkpoint ``state_dict`` has the average, so that
    ``load_from_checkpoint`` gives it; the raw weights are in ``current_model_state``, and training resumes from them.
    Before the first update all is as if there were no callback.

    Args:
        target: name of the part, as in ``module.get_submodule``; ``""``: all of the module.
        decays: for each average, the share of it that stays when new weights come in, in [0, 1); with
            ``schedule="power"`` the exponents gamma > 0.
        evaluate: index of the average that evaluation and checkpoints see.
        start_step: updates of the weights to let pass before the first average, >= 0. The first average is the weights
            themselves.
        schedule: ``"constant"``, or ``"power"``: update ``k`` has the decay ``(1 - 1 / k)^(gamma + 1)``, which forgets
            a fixed share of the past (Karras et al. 2024, arXiv 2312.02696; gamma is 6.94 or 16.97 there).

    Raises:
        ValueError: an argument out of range; a module without ``target``; a checkpoint without these averages.
    """

    def __init__(
        self,
        target: str = "",
        decays: Sequence[float] = (0.999,),
        evaluate: int = 0,
        start_step: int = 0,
        schedule: Literal["constant", "power"] = "constant",
    ) -> None:
        if schedule not in ("constant", "power"):
            raise ValueError(f"schedule must be 'constant' or 'power', got {schedule!r}")
        allowed = "in [0, 1)" if schedule == "constant" else "> 0"
        if not decays or not all((0 <= d < 1) if schedule == "constant" else (0 < d < float("inf")) for d in decays):
            raise ValueError(f"decays must be one or more numbers {allowed}, got {list(decays)}")
        if not 0 <= evaluate < len(decays):
            raise ValueError(f"evaluate must be in [0, {len(decays) - 1}], got {evaluate}")
        if start_step < 0:
            raise ValueError(f"start_step must be >= 0, got {start_step}")
        self.target = target
        self.decays = tuple(decays)
        self.evaluate = evaluate
        self.start_step = start_step
        self.schedule = schedule
        self.averages: list[dict[str, Tensor]] = []
        self.steps = 0  # how often an optimizer has changed the weights
        self._stepped = False
        self._hooks: list[RemovableHandle] = []
        self._raw: dict[str, Tensor] | None = None  # the weights in training, while the module has the average

    @property
    def state_key(self) -> str:
        """Tells averages of several parts apart."""
        return self._generate_state_key(target=self.target)

    def state_dict(self) -> dict[str, Any]:
        """Every average by the names of its weights, and the number of steps."""
        return {"steps": self.steps, "averages": self.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue averages from a checkpoint."""
        if state_dict["averages"] and len(state_dict["averages"]) != len(self.decays):
            raise ValueError(
                f"decays must be as many as the checkpoint has averages, {len(state_dict['averages'])}, got "
                f"{len(self.decays)}"
            )
        self.steps = state_dict["steps"]
        self.averages = [dict(average) for average in state_dict["averages"]]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the part; a new ``fit`` begins new averages."""
        self._part(pl_module)
        if stage == "fit":
            self._give_back(pl_module)
            self.averages, self.steps = [], 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move loaded averages to where the weights are, and listen to the optimizers of the part."""
        weights = self._weights(pl_module)
        for average in self.averages:
            if average.keys() != weights.keys():
                raise ValueError(f"the checkpoint has averages of other weights than those of {self.target!r}")
            average.update({name: average[name].to(weight) for name, weight in weights.items()})
        parameters = {id(p) for p in self._part(pl_module).parameters()}
        for optimizer in trainer.optimizers:
            if any(id(p) in parameters for group in optimizer.param_groups for p in group["params"]):
                self._hooks.append(optimizer.register_step_post_hook(self._note_step))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the averages, if an optimizer has changed the weights since the last batch."""
        if not self._stepped:
            return
        self._stepped = False
        self.steps += 1
        update = self.steps - self.start_step
        if update < 1:
            return
        weights = self._weights(pl_module)
        if not self.averages:
            self.averages = [{name: weight.clone() for name, weight in weights.items()} for _ in self.decays]
            return
        for decay, average in zip(self.decays, self.averages, strict=True):
            share = 1 - decay if self.schedule == "constant" else 1 - (1 - 1 / update) ** (decay + 1)
            torch._foreach_lerp_(list(average.values()), list(weights.values()), share)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._put_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take it out again."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._give_back(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module."""
        self._put_in(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers."""
        while self._hooks:
            self._hooks.pop().remove()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average into ``state_dict`` and the raw weights into ``current_model_state``."""
        if not self.averages or "state_dict" not in checkpoint:
            return
        raw = checkpoint.setdefault("current_model_state", dict(checkpoint["state_dict"]))
        prefix = f"{self.target}." if self.target else ""
        for name, average in self.averages[self.evaluate].items():
            checkpoint["state_dict"][prefix + name] = average
            if self._raw is not None:
                raw[prefix + name] = self._raw[name]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resume training from the raw weights."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if self.state_key not in checkpoint.get("callbacks", {}):
            raise ValueError(f"the checkpoint must have the averages of target {self.target!r}, but has none")
        if "current_model_state" in checkpoint:
            pl_module.load_state_dict(checkpoint["current_model_state"], strict=pl_module.strict_loading)

    def _part(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.target)
        except AttributeError as error:
            names = [name for name, _ in pl_module.named_children()]
            raise ValueError(f"target must name a part of the module such as {names}, got {self.target!r}") from error

    def _weights(self, pl_module: LightningModule) -> dict[str, Tensor]:
        return {name: p.data for name, p in self._part(pl_module).named_parameters()}

    def _note_step(self, *_: Any) -> None:
        self._stepped = True

    def _put_in(self, pl_module: LightningModule) -> None:
        if self.averages and self._raw is None:
            weights = self._weights(pl_module)
            self._raw = {name: weight.clone() for name, weight in weights.items()}
            _copy(self.averages[self.evaluate], weights)

    def _give_back(self, pl_module: LightningModule) -> None:
        if self._raw is not None:
            _copy(self._raw, self._weights(pl_module))
            self._raw = None


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    torch._foreach_copy_(list(target.values()), list(source.values()))
