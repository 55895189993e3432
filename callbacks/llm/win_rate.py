"""Win rates of a language model on held-out prompts, with confidence intervals."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_methods.optim.foundation.ranks import gather_objects


class WinRate(Callback):
    """How often the policy is preferred to opponents on the validation (or test) prompts.

    Every prompt is answered once by each side with fixed seeds; the judge is asked in both orders. For modules whose
    validation step returns ``prompts``, ``rows``, ``responses`` and ``lengths`` and that have ``judge`` and
    ``respond``, such as :class:`~lit_methods.llm.NashMP`. Logs, per opponent and stage (``val`` or ``test``):

    - ``win_rate/<name>``, the mean probability of being preferred, and ``win_rate_low/<name>``,
      ``win_rate_high/<name>``, a bootstrap interval over prompts;
    - ``win_rate_lc/<name>``, length-controlled: what a logistic fit with the difference of lengths predicts at equal
      lengths (for opponents with weights);
    - ``win_rate/worst``, the smallest mean over the opponents of ``texts``.

    Args:
        opponents: ``"reference"``, ``"target"``, or paths: a checkpoint (``.ckpt``) of the same kind of module, or a
            folder that ``transformers`` loads (base model, exported model or adapter). Paths are named by their stem.
        texts: further opponents that always give the same response: name -> response.
        confidence: of the interval, in ``(0, 1)``.
        num_bootstrap: resampled sets of prompts.

    Attributes:
        records: opponent -> (row of the prompt, probability of winning, excess length) for each prompt of this rank in
            the last stage.

    Raises:
        ValueError: for an argument outside its range, or no opponent at all.
        FileNotFoundError: if a path does not exist.
    """

    def __init__(
        self,
        opponents: Sequence[str] = ("reference",),
        texts: dict[str, str] | None = None,
        confidence: float = 0.95,
        num_bootstrap: int = 1000,
    ) -> None:
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), got {confidence}")
        if num_bootstrap < 1:
            raise ValueError(f"num_bootstrap must be 1 or more, got {num_bootstrap}")
        if not opponents and not texts:
            raise ValueError("give at least one of opponents and texts")
        for opponent in opponents:
            if opponent not in ("reference", "target") and not Path(opponent).exists():
                raise FileNotFoundError(f"opponent {opponent!r} is neither 'reference', 'target' nor an existing path")
        self.opponents = list(opponents)
        self.texts = dict(texts or {})
        self.confidence = confidence
        self.num_bootstrap = num_bootstrap
        self._loaded: dict[str, Any] = {}
        self.records: dict[str, list[tuple[int, float, float]]] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last run."""
        self.records = {}

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Let every opponent answer, and judge."""
        module: Any = pl_module
        prompts = outputs["prompts"]
        for opponent in self.opponents:
            if opponent in ("reference", "target"):
                responses, lengths = module.respond(prompts, opponent, seed=batch_idx)
            else:
                responses, lengths = self._respond(module, opponent, prompts, batch_idx)
            name = opponent if opponent in ("reference", "target") else Path(opponent).stem
            self._judge(module, name, outputs, responses, lengths)
        for name, text in self.texts.items():
            self._judge(module, name, outputs, [text] * len(prompts), outputs["lengths"])

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the win rates."""
        self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the win rates."""
        self._log(trainer, pl_module, "test")

    def _judge(self, module: Any, name: str, outputs: Any, responses: list[str], lengths: list[int]) -> None:
        from lit_methods.llm.judges import query_judge

        ours, prompts = outputs["responses"], outputs["prompts"]
        forward = query_judge(module.judge, prompts, ours, responses)
        backward = query_judge(module.judge, prompts, responses, ours)
        wins = ((forward + 1 - backward) / 2).tolist()
        excess = [float(mine - theirs) for mine, theirs in zip(outputs["lengths"], lengths, strict=True)]
        rows = zip(outputs["rows"].tolist(), wins, excess, strict=True)
        self.records.setdefault(name, []).extend(rows)

    def _respond(self, module: Any, path: str, prompts: list[Any], seed: int) -> tuple[list[str], list[int]]:
        """Answer with a loaded policy in the place of the module's own."""
        if path not in self._loaded:
            self._loaded[path] = _load_policy(module, path)
        own = module.policy
        module.policy = self._loaded[path]
        try:
            return module.respond(prompts, "policy", seed=seed)
        finally:
            module.policy = own

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        records: list[dict[str, list[tuple[int, float, float]]]] = gather_objects(self.records)
        means = {}
        for name in self.records:
            # samplers repeat prompts to make ranks even: one record per prompt
            rows = {row[0]: row[1:] for part in records for row in part.get(name, [])}
            wins, excess = torch.tensor([rows[index] for index in sorted(rows)], dtype=torch.float64).T
            low, high = bootstrap_interval(wins, self.confidence, self.num_bootstrap)
            means[name] = float(wins.mean())
            logged = {"win_rate": means[name], "win_rate_low": low, "win_rate_high": high}
            if name not in self.texts:
                logged["win_rate_lc"] = length_controlled(wins, excess)
            for metric, value in logged.items():
                shown = metric == "win_rate" and name == "reference"
                pl_module.log(f"{stage}/{metric}/{name}", value, prog_bar=shown, rank_zero_only=False, sync_dist=False)
        if self.texts:
            pl_module.log(f"{stage}/win_rate/worst", min(means[name] for name in self.texts))


def bootstrap_interval(values: Tensor, confidence: float, num_bootstrap: int, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean over resampled values, ``(n,)``; deterministic."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (num_bootstrap, len(values)), generator=generator)
    means = values[picks].mean(1)
    tail = (1 - confidence) / 2
    return float(means.quantile(tail)), float(means.quantile(1 - tail))


def length_controlled(wins: Tensor, excess: Tensor) -> float:
    """Win rate at equal lengths: ``sigmoid(a)`` of the fit ``sigmoid(a + b tanh(excess / std))``, slightly ridged.

    Args:
        wins: probabilities of being preferred, ``(n,)``, float64.
        excess: how much longer than the opponent's the responses are, ``(n,)``.
    """
    spread = excess.std() if len(excess) > 1 else excess.new_zeros(())
    feature = torch.tanh(excess / spread) if spread > 0 else torch.zeros_like(excess)
    design = torch.stack([torch.ones_like(feature), feature], dim=1)
    weights = torch.zeros(2, dtype=wins.dtype)
    ridge = torch.diag(torch.tensor([1e-6, 1e-2], dtype=wins.dtype))
    for _ in range(50):
        fitted = torch.sigmoid(design @ weights)
        slope = design.T @ (wins - fitted) / len(wins) - ridge @ weights
        curvature = (design * (fitted * (1 - fitted)).unsqueeze(1)).T @ design / len(wins) + ridge
        weights = (weights + torch.linalg.solve(curvature, slope)).clamp(-30, 30)
    return float(torch.sigmoid(weights[0]))


def _load_policy(module: Any, path: str) -> Any:
    """The policy of a checkpoint or folder, on the module's device."""
    from lit_methods.llm.language_model import LanguageModel
    from lit_methods.llm.loading import load_causal_lm

    if path.endswith(".ckpt"):
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        weights = {key.removeprefix("policy."): value for key, value in state.items() if key.startswith("policy.")}
        policy = deepcopy(module.policy)
        _, unexpected = policy.load_state_dict(weights, strict=False)  # the base may have been left out
        if unexpected or not weights:
            raise ValueError(f"{path} is no checkpoint of this kind of module: unexpected {unexpected[:3]}")
    else:
        policy = LanguageModel(load_causal_lm(path), temperature=module.policy.temperature)
    return policy.to(module.device).eval().requires_grad_(False)
