"""What a trained policy looks like."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure

from lit_methods.callbacks.figures import output_dir, save_figure


class PolicyFrames(Callback):
    """Play one episode when ``fit`` ends and save a strip of its frames as ``policy_frames.png``, on rank zero.

    The module chooses its actions by ``act(observations, deterministic=True)``. The environment must be able to draw
    without a screen (``render_mode="rgb_array"``): classic control needs pygame, MuJoCo an OpenGL backend, chosen by
    the environment variable ``MUJOCO_GL`` (``egl`` or ``osmesa``).

    Args:
        env: gymnasium id.
        num_frames: frames in the strip, evenly spread over the episode, >= 1.
        seed: of the episode.
        env_kwargs: keyword arguments of the environment.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, env: str, num_frames: int = 8, seed: int = 0, env_kwargs: dict[str, Any] | None = None) -> None:
        if num_frames < 1:
            raise ValueError(f"num_frames must be >= 1, got {num_frames}")
        self.env = env
        self.num_frames = num_frames
        self.seed = seed
        self.env_kwargs = env_kwargs or {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Play and save."""
        folder = output_dir(trainer)
        if not trainer.is_global_zero:
            return
        frames, total = self._run_episode(pl_module)
        chosen = np.linspace(0, len(frames) - 1, self.num_frames).round().astype(int)
        figure = Figure(figsize=(2 * self.num_frames, 2.2), layout="constrained")
        for axes, i in zip(figure.subplots(1, self.num_frames, squeeze=False)[0], chosen, strict=True):
            axes.imshow(frames[i])
            axes.set_title(f"step {i}", fontsize=8)
            axes.axis("off")
        figure.suptitle(f"{self.env}: return {total:.1f} in {len(frames) - 1} steps")
        save_figure(trainer, figure, "policy_frames", folder)

    def _run_episode(self, pl_module: Any) -> tuple[list[Any], float]:
        try:
            import gymnasium as gym
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('PolicyFrames needs gymnasium: pip install "lit-methods[rl]"') from error
        env = gym.make(self.env, render_mode="rgb_array", **self.env_kwargs)
        observation, _ = env.reset(seed=self.seed)
        frames, total, done = [env.render()], 0.0, False
        while not done:
            seen = torch.as_tensor(np.asarray(observation, np.float32), device=pl_module.device)[None]
            action = pl_module.act(seen, deterministic=True)[0][0].cpu().numpy()
            if isinstance(env.action_space, gym.spaces.Box):
                action = np.clip(action, env.action_space.low, env.action_space.high)
            observation, reward, terminated, truncated, _ = env.step(action)
            frames.append(env.render())
            total, done = total + float(reward), terminated or truncated
        env.close()
        return frames, total
