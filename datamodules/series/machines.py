"""Time series from machines whose chances are known."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_methods.datamodules.series.arrays import TimeSeriesDataModule
from lit_methods.datamodules.tensors import check_int


class SymbolicMarkovDataModule(TimeSeriesDataModule):
    """Symbols of a probabilistic finite-state machine, as numbers: where chance enters is known at every step.

    In state ``s`` the machine emits a symbol and goes on to another state; ``machine[s]`` lists
    ``[probability, symbol, next state]``. Series begin in state 0. The default has period 3: a coin that shows 1 with
    probability 0.3, then 0, then 1. Batches are :class:`~lit_methods.batches.TimeSeriesBatch`. Nothing is fetched.

    Args:
        machine: the transitions; probabilities of a state sum to 1.
        symbols: the number that stands for each symbol.
        seq_len: steps, >= 1.
        train_size: training series, >= 1.
        val_size: validation series, >= 0.
        test_size: test series, >= 0.
        batch_size: series per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        pin_to_ranks: every rank keeps its series in all epochs.
        seed: of the series and of their order, >= 0.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        machine: Sequence[Sequence[Sequence[float]]] = (((0.3, 1, 1), (0.7, 0, 1)), ((1.0, 0, 2),), ((1.0, 1, 0),)),
        symbols: Sequence[float] = (-0.8, 0.8),
        seq_len: int = 24,
        train_size: int = 10,
        val_size: int = 0,
        test_size: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
        pin_to_ranks: bool = False,
        seed: int = 0,
    ) -> None:
        for state, choices in enumerate(machine):
            total = sum(choice[0] for choice in choices)
            if not all(len(choice) == 3 and choice[0] >= 0 for choice in choices) or abs(total - 1) > 1e-9:
                raise ValueError(f"machine must give state {state} probabilities that sum to 1, got {machine}")
            for _, symbol, target in choices:
                if symbol not in range(len(symbols)) or target not in range(len(machine)):
                    raise ValueError(
                        f"machine must name symbols in [0, {len(symbols) - 1}] and states in [0, {len(machine) - 1}], "
                        f"got {machine}"
                    )
        self.machine, self.symbols = machine, symbols
        sizes = (
            check_int("train_size", train_size, 1),
            check_int("val_size", val_size, 0),
            check_int("test_size", test_size, 0),
        )
        generator = torch.Generator().manual_seed(check_int("seed", seed, 0))
        values = self.draw(sum(sizes), check_int("seq_len", seq_len, 1), generator)
        train, val, test = values.split(sizes)
        super().__init__(
            train, val if val_size else None, test if test_size else None, batch_size, num_workers, pin_to_ranks, seed
        )

    def draw(self, count: int, steps: int, generator: torch.Generator | None = None) -> Tensor:
        """New series, float32 ``(count, steps, 1)``."""
        chances = torch.zeros(len(self.machine), max(len(choices) for choices in self.machine))
        emits, goes = torch.zeros_like(chances), torch.zeros(chances.shape, dtype=torch.int64)
        for state, choices in enumerate(self.machine):
            for i, (chance, symbol, target) in enumerate(choices):
                chances[state, i], emits[state, i], goes[state, i] = chance, self.symbols[int(symbol)], int(target)
        states, found = torch.zeros(count, dtype=torch.int64), []
        for _ in range(steps):
            chosen = torch.multinomial(chances[states], 1, generator=generator)[:, 0]
            found.append(emits[states, chosen])
            states = goes[states, chosen]
        return torch.stack(found, 1)[..., None]


class PrimitiveSwitchDataModule(TimeSeriesDataModule):
    """Drawn figures in the plane that follow each other by chance: a Markov chain of Lissajous primitives.

    Primitive ``k`` is ``0.8 (sin(f_k u), sin(g_k u))`` or its mirror image with ``u`` from 0 to ``2 pi`` in ``period``
    steps. All begin at the origin, where the next one is drawn: the same as before with probability ``stay``, else one
    of the others. Batches are :class:`~lit_methods.batches.TimeSeriesBatch`. Nothing is fetched.

    Args:
        frequencies: ``f_k`` and ``g_k`` of each primitive, integers other than 0; a negative ``f_k`` mirrors it.
        stay: probability of the same primitive again, in [0, 1].
        period: steps of a primitive, >= 4.
        repeats: primitives of a series, >= 1.
        noise: standard deviation of what is added, >= 0.
        train_size: training series, >= 1.
        val_size: validation series, >= 0.
        test_size: test series, >= 0.
        batch_size: series per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        pin_to_ranks: every rank keeps its series in all epochs.
        seed: of the series and of their order, >= 0.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        frequencies: Sequence[tuple[int, int]] = ((1, 2), (-1, 2), (2, 1)),
        stay: float = 0.5,
        period: int = 12,
        repeats: int = 4,
        noise: float = 0.01,
        train_size: int = 32,
        val_size: int = 16,
        test_size: int = 32,
        batch_size: int = 64,
        num_workers: int = 0,
        pin_to_ranks: bool = False,
        seed: int = 0,
    ) -> None:
        if len(frequencies) < 2 or any(len(pair) != 2 or 0 in pair for pair in frequencies):
            raise ValueError(f"frequencies must hold 2 or more pairs of numbers other than 0, got {list(frequencies)}")
        if not 0 <= stay <= 1:
            raise ValueError(f"stay must be in [0, 1], got {stay}")
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise must be >= 0 and finite, got {noise}")
        check_int("period", period, 4)
        sizes = (
            check_int("train_size", train_size, 1),
            check_int("val_size", val_size, 0),
            check_int("test_size", test_size, 0),
        )
        generator = torch.Generator().manual_seed(check_int("seed", seed, 0))
        count, kinds = sum(sizes), len(frequencies)
        chosen = [torch.randint(kinds, (count,), generator=generator)]
        for _ in range(check_int("repeats", repeats, 1) - 1):
            moves = torch.rand(count, generator=generator) >= stay
            step = torch.randint(1, kinds, (count,), generator=generator)
            chosen.append((chosen[-1] + moves * step) % kinds)
        self.primitives = torch.stack(chosen, 1)  # (series, repeats)
        u = torch.arange(1, period + 1) * (2 * math.pi / period)
        figures = 0.8 * torch.sin(torch.tensor(frequencies, dtype=torch.float32)[:, None] * u[:, None])
        values = figures[self.primitives].flatten(1, 2)
        values = values + noise * torch.randn(values.shape, generator=generator)
        train, val, test = values.split(sizes)
        super().__init__(
            train, val if val_size else None, test if test_size else None, batch_size, num_workers, pin_to_ranks, seed
        )


class SinesDataModule(TimeSeriesDataModule):
    """Sines of one period and every phase: training phases are evenly spaced, the others lie in between by chance.

    Batches are :class:`~lit_methods.batches.TimeSeriesBatch` with one number a step. Nothing is fetched.

    Args:
        period: in steps, >= 2.
        amplitude: > 0.
        seq_len: steps, >= 1.
        train_size: training series, >= 1.
        val_size: validation series, >= 0.
        test_size: test series, >= 0.
        batch_size: series per batch on each rank, >= 1.
        num_workers: loader processes on each rank, >= 0.
        pin_to_ranks: every rank keeps its series in all epochs.
        seed: of the phases and of the order, >= 0.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        period: int = 8,
        amplitude: float = 0.8,
        seq_len: int = 24,
        train_size: int = 16,
        val_size: int = 0,
        test_size: int = 32,
        batch_size: int = 64,
        num_workers: int = 0,
        pin_to_ranks: bool = False,
        seed: int = 0,
    ) -> None:
        check_int("period", period, 2)
        if not 0 < amplitude < math.inf:
            raise ValueError(f"amplitude must be > 0 and finite, got {amplitude}")
        _, *others = _check_sizes(train_size, val_size, test_size)
        generator = torch.Generator().manual_seed(check_int("seed", seed, 0))
        steps = torch.arange(check_int("seq_len", seq_len, 1)) / period
        phases = [torch.arange(train_size) / train_size, *(torch.rand(size, generator=generator) for size in others)]
        train, val, test = (
            amplitude * torch.sin(2 * math.pi * (steps + phase[:, None]))[..., None] for phase in phases
        )
        super().__init__(
            train, val if val_size else None, test if test_size else None, batch_size, num_workers, pin_to_ranks, seed
        )


def _check_sizes(train_size: int, val_size: int, test_size: int) -> list[int]:
    return [
        check_int("train_size", train_size, 1),
        check_int("val_size", val_size, 0),
        check_int("test_size", test_size, 0),
    ]
