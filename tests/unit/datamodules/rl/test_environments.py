from types import SimpleNamespace
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import TimeLimit
from torch import Tensor

from lit_methods.batches import TransitionBatch
from lit_methods.datamodules import D4RLDataModule, ReplayDataModule, RolloutDataModule
from lit_methods.datamodules.rl.environments import Collector, SeededEpisodes, evaluate
from lit_methods.datamodules.rl.replay import PackedTransitions


class Counter(gym.Env):
    """Observes how many steps its episode has; ends at ``end``, at once when told an action above 0.5."""

    def __init__(self, end: int = 5, action_space: gym.Space | None = None, observation_space: gym.Space | None = None):
        self.end = end
        self.observation_space = observation_space or gym.spaces.Box(-np.inf, np.inf, (2,))
        self.action_space = action_space or gym.spaces.Box(-1, 1, (1,))

    actions: ClassVar[list[float]] = []  # of all counters
    seeds: ClassVar[list[int]] = []

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.seeds.append(seed)
        super().reset(seed=seed)
        self.start, self.steps = self.np_random.random(), 0
        return self._observe(), {"noise": 1}

    def step(self, action):
        self.steps += 1
        self.actions.append(float(action[0]))
        return self._observe(), float(self.steps), self.steps == self.end or bool(action[0] > 0.5), False, {}

    def _observe(self):
        return np.array([self.steps, self.start])


class Agent:
    device = torch.device("cpu")

    def __init__(self, action: float = 0.0) -> None:
        self.action = action

    def act(self, observations: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        return torch.full((len(observations), 1), self.action), torch.zeros(len(observations))


def with_agent(data, agent=None):
    data.trainer = SimpleNamespace(lightning_module=agent or Agent(), global_rank=0, world_size=1)
    data.setup("fit")
    return data


def limited_counter(limit: int = 3) -> gym.Env:
    return TimeLimit(Counter(end=10), limit)


def test_rollout_keeps_the_final_observation_and_says_how_the_episode_ended():
    data = with_agent(RolloutDataModule(Counter, num_envs=2, rollout_steps=7, env_kwargs={"end": 3}))
    batch = next(iter(data.train_dataloader()))
    assert batch.observations[:, 0, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert batch.next_observations[:, 0, 0].tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert batch.terminations[:, 0].tolist() == [0, 0, 1, 0, 0, 1, 0]
    assert not batch.truncations.any()
    assert batch.rewards[:, 1].tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert batch.episode_returns.tolist() == [6] * 4
    assert int(batch.env_steps) == 14
    start = batch.observations[:, :, 1]
    assert torch.equal(batch.next_observations[:, :, 1], start)  # an episode keeps its start to its last step
    assert len(start.unique()) == 6  # and every episode of every environment has its own


def test_time_limits_are_truncations():
    data = with_agent(RolloutDataModule(limited_counter, num_envs=1, rollout_steps=4))
    batch = next(iter(data.train_dataloader()))
    assert batch.truncations[:, 0].tolist() == [0, 0, 1, 0]
    assert not batch.terminations.any()


def test_rollouts_go_on_where_the_last_one_stopped():
    data = with_agent(RolloutDataModule(Counter, num_envs=1, rollout_steps=3, iterations_per_epoch=3))
    loader = data.train_dataloader()
    seen = [step for batch in loader for step in batch.observations[:, 0, 0].tolist()]
    assert seen == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert next(iter(loader)).observations[:, 0, 0].tolist() == [4, 0, 1]  # the next epoch


def test_actions_are_clipped_on_their_way_only():
    data = with_agent(RolloutDataModule(Counter, num_envs=1, rollout_steps=1), Agent(-7.0))
    batch = next(iter(data.train_dataloader()))
    assert float(batch.actions) == -7
    assert Counter.actions[-1] == -1


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("env", ["Hopper-v5", "Pendulum-v1", "CartPole-v1"])
def test_environments_come_back_to_where_they_were(env, vectorization):
    if vectorization == "async" and env != "Hopper-v5":
        pytest.skip("one environment is enough to see the processes")
    rng = np.random.default_rng(0)

    def steps(collector: Collector, actions: list[np.ndarray]) -> list[list[float]]:
        return [np.concatenate([np.ravel(x) for x in collector.step(a)]).tolist() for a in actions]

    collector = Collector(env, {}, 3, vectorization, seed=5)
    collector.envs.action_space.seed(0)
    actions = [collector.envs.action_space.sample() for _ in range(130)]
    steps(collector, actions[:70])
    state = collector.state_dict()
    expected = steps(collector, actions[70:])
    other = Collector(env, {}, 3, vectorization, seed=5)
    steps(other, [rng.permutation(a) for a in actions[:9]])
    other.load_state_dict(state)
    assert steps(other, actions[70:]) == expected
    assert other.steps == collector.steps
    with pytest.raises(ValueError, match="the checkpoint has 3 environments, num_envs=2"):
        Collector(env, {}, 2, "sync", seed=5).load_state_dict(state)
    collector.close()
    other.close()


def test_episodes_have_seeds_of_their_own():
    env = SeededEpisodes(Counter(), 3)
    starts = [env.reset()[0][1] for _ in range(4)]
    again = SeededEpisodes(Counter(), 3)
    assert [again.reset()[0][1] for _ in range(4)] == starts
    assert len(set(starts)) == 4
    assert env.step(np.zeros(1))[4] == {}


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        ({"observation_space": gym.spaces.Dict(x=gym.spaces.Box(0, 1))}, "is not a Box; flatten"),
        ({"action_space": gym.spaces.Box(0, 1, (1, 2))}, "Discrete or a Box of one dimension"),
        ({"action_space": gym.spaces.MultiDiscrete([2, 2])}, "Discrete or a Box of one dimension"),
        ({"action_space": gym.spaces.Discrete(3, start=1)}, "must start at 0"),
    ],
)
def test_spaces_that_do_not_fit(spaces, message):
    with pytest.raises(ValueError, match=message):
        RolloutDataModule(Counter, env_kwargs=spaces).setup("fit")


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        ({"action_space": gym.spaces.Discrete(3)}, "use RolloutDataModule"),
        ({"action_space": gym.spaces.Box(-np.inf, np.inf, (1,))}, r"finite bounds, got \(-inf,\) and \(inf,\)"),
        ({"observation_space": gym.spaces.Box(0, 1, (2, 3))}, r"one dimension, got shape \(2, 3\): flatten"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_spaces_that_do_not_fit_off_policy(spaces, message, stage):
    with pytest.raises(ValueError, match=message):
        ReplayDataModule(Counter, env_kwargs=spaces).setup(stage)


def test_on_policy_needs_no_bounds():
    """``ClipAction`` takes them away."""
    data = with_agent(
        RolloutDataModule(lambda: gym.wrappers.ClipAction(Counter()), num_envs=1, rollout_steps=4), Agent(0.2)
    )
    assert data.spaces == ((2,), 0, (-np.inf,), (np.inf,), False)
    assert next(iter(data.train_dataloader())).actions.shape == (4, 1, 1)
    with pytest.raises(ValueError, match="ClipAction took them away, leave it out"):
        ReplayDataModule(lambda: gym.wrappers.ClipAction(Counter())).setup("fit")


def test_replay_holds_what_was_seen():
    data = with_agent(
        ReplayDataModule(Counter, num_envs=2, capacity=100, batch_size=64, learning_starts=10, updates_per_epoch=8,
                         updates_per_step=2, steps_per_update=3, env_kwargs={"end": 4}),
        Agent(0.25),
    )  # fmt: skip
    batches: list[TransitionBatch] = list(data.train_dataloader())
    assert [int(b.env_steps) for b in batches] == [16, 16, 22, 22, 28, 28, 34, 34]
    for batch in batches:
        assert torch.equal(batch.next_observations[:, 0], batch.observations[:, 0] + 1)
        assert torch.equal(batch.next_observations[:, 1], batch.observations[:, 1])
        assert torch.equal(batch.rewards, batch.next_observations[:, 0])
        early = batch.actions[:, 0] > 0.5
        assert torch.equal(batch.terminations.bool(), early | (batch.next_observations[:, 0] == 4))
        assert (batch.actions.abs() <= 1).all()
    random = torch.cat([b.actions for b in batches])
    assert len(random[random != 0.25].unique()) == 10  # the random steps, each environment its own
    assert sum(len(b.episode_returns) for b in batches) >= 8


def test_the_oldest_transitions_go_first():
    buffer = PackedTransitions((1,), 1, capacity=4)
    for i in range(6):
        buffer.add(torch.full((1, 5), float(i)))
    assert len(buffer) == 4
    assert sorted(buffer.rows[:, 0].tolist()) == [2, 3, 4, 5]
    batch = buffer.batch(torch.tensor([0, 1]), torch.empty(0), 6)
    assert batch.rewards.tolist() == [4, 5]


def test_time_limits_do_not_terminate_in_the_replay_buffer():
    data = with_agent(ReplayDataModule(limited_counter, batch_size=32, learning_starts=20), Agent(0.0))
    batch = next(iter(data.train_dataloader()))
    assert (batch.terminations == (batch.actions[:, 0] > 0.5)).all()
    assert batch.next_observations[:, 0].max() == 3


def test_evaluation_plays_whole_episodes_from_fixed_seeds():
    found = evaluate(Agent(0.0), Counter, {"end": 4}, seeds=[3, 4, 5])
    assert found.returns.tolist() == [10, 10, 10]
    assert found.lengths.tolist() == [4, 4, 4]
    data = with_agent(RolloutDataModule(Counter, num_eval_episodes=5))
    val, again, test = (
        next(iter(loader)) for loader in (data.val_dataloader(), data.val_dataloader(), data.test_dataloader())
    )
    assert torch.equal(val.returns, again.returns)
    assert len(test.returns) == 5
    first = next(iter(data.predict_dataloader()))
    assert first.shape == (5, 2)


def test_ranks_share_the_evaluation_episodes():
    played = []
    for rank in range(3):
        data = with_agent(RolloutDataModule(Counter, num_eval_episodes=7))
        data.trainer = SimpleNamespace(global_rank=rank, world_size=3, lightning_module=Agent())
        Counter.seeds.clear()
        next(iter(data.val_dataloader()))
        played += sorted(set(range(1_000_000, 1_000_007)) & set(Counter.seeds))
    assert sorted(played) == list(range(1_000_000, 1_000_007))


def test_modules_that_cannot_act_are_refused():
    data = with_agent(RolloutDataModule(Counter), agent=torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="Linear has no act"):
        next(iter(data.train_dataloader()))


def test_training_steps_can_be_recorded(tmp_path):
    path = tmp_path / "steps.hdf5"
    data = with_agent(
        RolloutDataModule(limited_counter, num_envs=2, rollout_steps=5, iterations_per_epoch=2, record_to=path)
    )
    batches = list(data.train_dataloader())
    data.teardown("fit")
    offline = D4RLDataModule(path, next_observations="stored")
    offline.setup("fit")
    rows = offline.transitions.rows
    expected = torch.cat([torch.cat([b.observations, b.next_observations], 2) for b in batches]).transpose(0, 1)
    assert torch.equal(torch.cat([rows[:, :2], rows[:, 4:6]], 1), expected.reshape(20, 4))
    shifted = D4RLDataModule(path)
    shifted.setup("fit")
    assert shifted.num_transitions == 12  # of 20 steps each third is cut by the time limit, and the last of each row


def test_evaluation_may_sample_actions_the_same_every_time():
    class Sampler(Agent):
        def act(self, observations, deterministic=False):
            actions, log_probs = super().act(observations)
            return (actions if deterministic else actions + torch.rand_like(actions)), log_probs

    episodes = {}
    for actions in ("mean", "sample"):
        data = with_agent(
            RolloutDataModule(Counter, num_eval_episodes=8, eval_actions=actions, env_kwargs={"end": 20}), Sampler(0.0)
        )
        first, second = (next(iter(data.val_dataloader())) for _ in range(2))
        assert torch.equal(first.lengths, second.lengths)
        state = torch.get_rng_state()
        evaluate(Sampler(0.0), Counter, {"end": 20}, [1, 2], deterministic=actions == "mean")
        assert torch.equal(torch.get_rng_state(), state)
        episodes[actions] = first.lengths
    assert (episodes["mean"] == 20).all()
    assert (episodes["sample"] < 20).any()
    with pytest.raises(ValueError, match="eval_actions must be 'mean' or 'sample', got 'max'"):
        RolloutDataModule(Counter, eval_actions="max")
