"""A tabular Markov game with entropy regularisation, and its Fisher geometry."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MarkovGame(nn.Module):
    """Players with softmax policies in a tabular Markov game; each minimises minus its regularised payoff.

    ``J_i = sum_s d(s) r_i(s) + tau sum_s H(pi_i(. | s))``, where ``d`` is the discounted occupancy from the first
    state, normalised to 1, and ``r_i(s)`` the mean reward under the joint policy. A block holds a player's logits,
    ``(S A_i,)`` by rows of states. Without arguments it is the paper's game: two states and actions, a common reward of
    1 where the actions match and -1 elsewhere, and the state that matched actions lead to with probability 0.9.

    Args:
        transitions: probabilities of the next state, ``(S, A_1, ..., A_N, S)``.
        rewards: ``(N, S, A_1, ..., A_N)``, payoffs: they are maximised.
        gamma: discount, in [0, 1).
        tau: weight of the entropy, >= 0.
        start: the first state.

    Raises:
        ValueError: an argument out of range, or shapes that do not fit.
    """

    transitions: Tensor
    rewards: Tensor

    def __init__(
        self,
        transitions: Sequence[object] | None = None,
        rewards: Sequence[object] | None = None,
        gamma: float = 0.9,
        tau: float = 1.0,
        start: int = 0,
    ) -> None:
        super().__init__()
        p = _PAPER_TRANSITIONS if transitions is None else torch.as_tensor(transitions, dtype=torch.float64)
        r = _PAPER_REWARDS if rewards is None else torch.as_tensor(rewards, dtype=torch.float64)
        if p.ndim < 4 or p.shape[0] != p.shape[-1] or not torch.allclose(p.sum(-1), torch.ones_like(p[..., 0])):
            raise ValueError(f"transitions must be probabilities (S, A_1, ..., A_N, S), got shape {tuple(p.shape)}")
        if r.shape != (p.ndim - 2, *p.shape[:-1]):
            raise ValueError(f"rewards must be of shape {(p.ndim - 2, *p.shape[:-1])}, got {tuple(r.shape)}")
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma must be in [0, 1), got {gamma}")
        if not 0 <= tau < float("inf"):
            raise ValueError(f"tau must be >= 0 and finite, got {tau}")
        if not 0 <= start < len(p):
            raise ValueError(f"start must be a state in 0..{len(p) - 1}, got {start}")
        self.register_buffer("transitions", p, persistent=False)
        self.register_buffer("rewards", r, persistent=False)
        self.gamma, self.tau, self.start = gamma, tau, start
        self.num_actions = tuple(p.shape[1:-1])

    @property
    def sizes(self) -> list[int]:
        """Logits of each player."""
        return [len(self.transitions) * actions for actions in self.num_actions]

    def policies(self, *blocks: Tensor) -> list[Tensor]:
        """Each player's probabilities ``(S, A_i)``.

        Raises:
            ValueError: not one block for each player.
        """
        if len(blocks) != len(self.num_actions):
            raise ValueError(f"blocks must be one for each of {len(self.num_actions)} players, got {len(blocks)}")
        return [
            block.view(len(self.transitions), actions).softmax(1)
            for block, actions in zip(blocks, self.num_actions, strict=True)
        ]

    def losses(self, *blocks: Tensor) -> list[Tensor]:
        """Minus the regularised payoffs."""
        policies = self.policies(*blocks)
        joint = policies[0]
        for policy in policies[1:]:
            joint = joint[..., None] * policy.view(len(policy), *([1] * (joint.ndim - 1)), -1)
        axes = tuple(range(1, joint.ndim))
        transitions, rewards = self.transitions.to(joint), self.rewards.to(joint)
        step = (joint[..., None] * transitions).sum(axes)
        first = torch.nn.functional.one_hot(torch.tensor(self.start), len(step)).to(joint)
        identity = torch.eye(len(step), dtype=joint.dtype)
        occupancy = (1 - self.gamma) * torch.linalg.solve(identity - self.gamma * step.T, first)
        payoffs = ((joint * rewards).sum(tuple(range(2, rewards.ndim))) * occupancy).sum(1)
        entropies = [-(policy * policy.log()).sum() for policy in policies]
        return [-(payoff + self.tau * entropy) for payoff, entropy in zip(payoffs, entropies, strict=True)]

    def fisher_metric(self, *blocks: Tensor) -> list[Tensor]:
        """Matrices ``W_i`` ``(d_i, S (A_i - 1))`` with ``W_i W_i' = F_i^+``, the pseudo-inverse of the Fisher matrix.

        Adding a constant to a state's logits changes no policy. These directions are left out by an orthonormal basis
        of the others, so that no eigenvalue needs a clamp.
        """
        factors = []
        for policy in self.policies(*blocks):
            states, actions = policy.shape
            basis = torch.linalg.qr(torch.eye(actions, dtype=policy.dtype) - 1 / actions)[0][:, : actions - 1]
            fisher = torch.diag_embed(policy) - policy[:, :, None] * policy[:, None, :]
            values, vectors = torch.linalg.eigh(basis.T @ fisher @ basis)
            of_states = basis @ (vectors * values.rsqrt()[:, None, :])
            factors.append(torch.block_diag(*of_states.unbind()) if states > 1 else of_states[0])
        return factors

    def divergence(self, to: Sequence[Tensor], blocks: Sequence[Tensor]) -> Tensor:
        """``sum_s KL(pi*_i | pi_i)`` for each player, ``(N,)``.

        Args:
            to: blocks of the equilibrium.
            blocks: where the players are.
        """
        pairs = zip(self.policies(*to), self.policies(*blocks), strict=True)
        return torch.stack([(target * (target.log() - policy.log())).sum() for target, policy in pairs])

    def gaps(self, *blocks: Tensor) -> Tensor:
        """What each player gains at least by its own best answer, ``(N,)``, >= 0; by L-BFGS from where it is."""
        start = torch.stack(self.losses(*(block.detach().double() for block in blocks)))
        gains = []
        for i in range(len(blocks)):
            mine = blocks[i].detach().double().clone().requires_grad_()
            others = [block.detach().double() for block in blocks]
            optimizer = torch.optim.LBFGS([mine], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

            def closure(i: int = i, mine: Tensor = mine, others: list[Tensor] = others) -> Tensor:
                mine.grad = None
                loss = self.losses(*others[:i], mine, *others[i + 1 :])[i]
                loss.backward()
                return loss

            with torch.enable_grad():
                optimizer.step(closure)
                gains.append(start[i] - closure().detach())
        return torch.stack(gains).clamp(min=0.0)


_PAPER_REWARDS = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]] * 2, dtype=torch.float64).expand(2, 2, 2, 2)
_PAPER_TRANSITIONS = torch.tensor([[[[0.9, 0.1], [0.5, 0.5]], [[0.5, 0.5], [0.1, 0.9]]]] * 2, dtype=torch.float64)
