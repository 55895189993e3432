"""Online imitation: states that the learner or the expert visits in a gymnasium environment, labelled by the expert."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_methods.batches import ImitationBatch
from lit_methods.datamodules.tensors import TensorDataModule, check_int

Act = Callable[[Tensor], Tensor]


class ImitationDataModule(TensorDataModule):
    """One round of interaction per epoch; batches are :class:`~lit_methods.batches.ImitationBatch`.

    At the start of each training epoch ``samples_per_round`` steps are taken in ``num_envs`` copies of the environment,
    by the expert with probability β, else by the learner, independently at each step. The learner is the method
    ``act`` of the Trainer's LightningModule: ``(n, observation_size)`` to ``(n, action_size)``; without a Trainer the
    expert acts. The epoch then runs over the round's states, or over all so far. Validation and test batches are whole
    episodes of the learner alone, from starts that are the same in every round.

    Give the Trainer ``reload_dataloaders_every_n_epochs: 1``. A round is a pure function of (seed, round, learner), and
    its data are in the checkpoint, so runs resume exactly, also within an epoch. With several ranks each plays the same
    round and trains on its share.

    Args:
        env: gymnasium id of an environment with vector observations and a bounded Box of actions.
        expert: maps observations to actions.
        samples_per_round: environment steps of a round, >= 1.
        num_envs: environments that step together, >= 1.
        beta: β in the first round, in [0, 1]; 0: the learner acts from the start.
        beta_decay: factor of β from round to round, in [0, 1].
        aggregate: train on the data of all rounds so far (DAgger), not only on the last.
        actions: how actions become valid: "clip" to the bounds; "tanh" squashes, then scales to them, for policies that
            give the mean before squashing, as those of SAC do.
        env_arguments: further arguments of ``gymnasium.make``.
        eval_episodes: episodes of a validation or test, >= 1.
        batch_size: states per batch on each rank, >= 1; None: all of the epoch, one step per round.
        num_workers: loader processes on each rank, >= 0.
        seed: of the starts, the β-mixture and the sample order, >= 0.

    Raises:
        ValueError: for an argument out of range, or an environment with other spaces.
        ImportError: gymnasium is missing; names the extra.
    """

    def __init__(
        self,
        env: str,
        expert: nn.Module,
        samples_per_round: int = 100,
        num_envs: int = 1,
        beta: float = 0.0,
        beta_decay: float = 1.0,
        aggregate: bool = False,
        actions: Literal["clip", "tanh"] = "clip",
        env_arguments: dict[str, Any] | None = None,
        eval_episodes: int = 5,
        batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=1 if batch_size is None else batch_size, num_workers=num_workers, seed=seed)
        self.env = env
        self.expert = expert
        self.samples_per_round = check_int("samples_per_round", samples_per_round, 1)
        self.num_envs = check_int("num_envs", num_envs, 1)
        for name, value in (("beta", beta), ("beta_decay", beta_decay)):
            if not 0 <= value <= 1:
                raise ValueError(f"Invalid {name}={value!r}: must be in [0, 1].")
        if actions not in ("clip", "tanh"):
            raise ValueError(f"Invalid actions={actions!r}: must be 'clip' or 'tanh'.")
        self.beta = beta
        self.beta_decay = beta_decay
        self.aggregate = aggregate
        self.actions = actions
        self.env_arguments = env_arguments or {}
        self.eval_episodes = check_int("eval_episodes", eval_episodes, 1)
        self.whole_rounds = batch_size is None
        self.played = -1  # the last round whose data is there

    def setup(self, stage: str) -> None:
        """Check the environment's spaces; rounds are played when loaders are asked for."""
        self._make(1).close()
        if stage == "fit":
            self.played, self.train_data = -1, None

    def train_dataloader(self) -> StatefulDataLoader:
        """Play this epoch's round, unless a checkpoint brought it, and return a loader over the data."""
        current = 0 if self.trainer is None else self.trainer.current_epoch
        if self.trainer is not None and self.trainer.reload_dataloaders_every_n_epochs != 1:  # type: ignore[attr-defined]
            rank_zero_warn(
                "the first round is all that will be played: set Trainer(reload_dataloaders_every_n_epochs=1)"
            )
        if self.played != current:
            new = self.play(current)
            old = self.train_data if self.aggregate else None
            self.train_data = new if old is None else ImitationBatch(*map(torch.cat, zip(old, new, strict=True)))
            self.played = current
        if self.whole_rounds:
            assert self.train_data is not None
            self.batch_size = math.ceil(len(self.train_data[0]) / self._ranks()[0])
        return super().train_dataloader()

    def val_dataloader(self) -> StatefulDataLoader:
        """Play the learner's validation episodes."""
        return self._episodes(1)

    def test_dataloader(self) -> StatefulDataLoader:
        """Play the learner's test episodes, from other starts."""
        return self._episodes(2)

    def play(self, round_: int) -> ImitationBatch:
        """The data of round ``round_`` with the present learner."""
        generator = torch.Generator().manual_seed(_seed(self.seed, 0, round_))
        beta = self.beta * self.beta_decay**round_ if self.trainer is not None else 1.0

        def mixed(observations: Tensor) -> Tensor:
            by_expert = torch.rand(len(observations), 1, generator=generator) < beta
            return torch.where(by_expert, self.expert(observations), self._learner(observations))

        steps = math.ceil(self.samples_per_round / self.num_envs)
        data, _ = self._rollout(mixed, self.num_envs, steps, _seed(self.seed, 3, round_))
        return ImitationBatch(*(tensor.flatten(0, 1)[: self.samples_per_round] for tensor in data))

    def state_dict(self) -> dict[str, Any]:
        """Return the last round and its data, and what a resumed run must share with the run that wrote them."""
        settings = ("env", "samples_per_round", "num_envs", "beta", "beta_decay", "aggregate", "seed", "num_workers")
        shared: dict[str, Any] = {name: getattr(self, name) for name in settings}
        data = [] if self.train_data is None else list(self.train_data)
        shared["batch_size"] = None if self.whole_rounds else self.batch_size
        return {**shared, "played": self.played, "data": data}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the data; refuse to resume training with other settings."""
        shared = {name: value for name, value in state_dict.items() if name not in ("played", "data")}
        super().load_state_dict(shared)
        self.played = state_dict["played"]
        self.train_data = ImitationBatch(*state_dict["data"]) if state_dict["data"] else None

    def _episodes(self, purpose: int) -> StatefulDataLoader:
        generator = torch.Generator().manual_seed(self.seed)  # else each evaluation draws from the global generator
        return StatefulDataLoader(_Episodes(self, purpose), batch_size=None, generator=generator)

    @torch.no_grad()
    def _learner(self, observations: Tensor) -> Tensor:
        module: Any = None if self.trainer is None else self.trainer.lightning_module
        if module is None:
            return self.expert(observations)
        return module.act(observations.to(module.device)).float().cpu()

    @torch.no_grad()
    def _rollout(self, act: Act, num_envs: int, steps: int | None, seed: int) -> tuple[ImitationBatch, Tensor]:
        """``steps`` steps, or until every environment has ended an episode.

        Returns:
            Data of shape (steps, num_envs, ...), and which of it belongs to first episodes, (steps, num_envs).
        """
        envs = self._make(num_envs)
        space = envs.single_action_space
        low, high = torch.from_numpy(space.low), torch.from_numpy(space.high)
        observed, _ = envs.reset(seed=seed)
        rows: list[tuple[Tensor, ...]] = []
        alive = torch.ones(num_envs, dtype=torch.bool)
        while len(rows) < steps if steps is not None else bool(alive.any()):
            x = torch.from_numpy(np.asarray(observed)).float()
            action = act(x)
            valid = (
                (low + (high - low) * (action.tanh() + 1) / 2) if self.actions == "tanh" else action.clamp(low, high)
            )
            observed, reward, terminated, truncated, _ = envs.step(valid.numpy())
            end = torch.from_numpy(terminated | truncated)
            rows.append((x, self.expert(x), torch.from_numpy(np.asarray(reward)).float(), end, alive))
            alive = alive & ~end
        envs.close()
        *data, alive_rows = (torch.stack(column) for column in zip(*rows, strict=True))
        return ImitationBatch(*data), alive_rows

    def _make(self, num_envs: int) -> Any:
        try:
            import gymnasium
            from gymnasium.vector import AutoresetMode
        except ImportError as error:
            raise ImportError("ImitationDataModule needs gymnasium: pip install 'lit-methods[rl]'") from error
        mode = {"autoreset_mode": AutoresetMode.SAME_STEP}
        envs = gymnasium.make_vec(self.env, num_envs, "sync", vector_kwargs=mode, **self.env_arguments)
        action: Any = envs.single_action_space
        observation: Any = envs.single_observation_space
        box = isinstance(action, gymnasium.spaces.Box) and isinstance(observation, gymnasium.spaces.Box)
        if not box or len(action.shape) != 1 or len(observation.shape) != 1 or not action.is_bounded():
            raise ValueError(f"Invalid env={self.env!r}: needs vectors of observations and bounded actions, {action}.")
        return envs


class _Episodes(IterableDataset[ImitationBatch]):
    """One batch: the learner's episodes, the same on every rank, played when they are asked for."""

    def __init__(self, datamodule: ImitationDataModule, purpose: int) -> None:
        self.datamodule = datamodule
        self.purpose = purpose

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[ImitationBatch]:
        settings = self.datamodule
        seed = _seed(settings.seed, self.purpose, 0)
        data, alive = settings._rollout(settings._learner, settings.eval_episodes, None, seed)
        yield ImitationBatch(*(tensor[alive] for tensor in data))


def _seed(seed: int, purpose: int, round_: int) -> int:
    return int(np.random.SeedSequence([seed, purpose, round_]).generate_state(1)[0])
