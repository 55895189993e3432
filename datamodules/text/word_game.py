"""Prompts and demonstrations of a toy word game."""

import torch

from lit_methods.datamodules.tensors import check_int
from lit_methods.datamodules.text.prompts import PromptDataModule

CLASSES = ("a", "b", "c", "x")


class WordGameDataModule(PromptDataModule):
    """Random prompts of ``p`` words, and responses whose words are of the classes a, b, c and x in given shares.

    A game made up to show preference learning without a download, not a data set: rows are a function of ``seed``.
    Words are a letter and a number: ``p0 ... p4`` in prompts, ``a0 ... a6``, ``b0 ...``, ``c0 ...``, ``x0 ... x4`` in
    responses of 3 to 9 words.

    Args:
        num_rows: rows, of which ``val_size`` are held out.
        shares: probabilities of the classes a, b, c and x.
        batch_size: prompts per training batch and rank.
        val_size: held-out rows.
        val_batch_size: prompts per validation batch and rank.
        num_workers: loader processes.
        seed: seed of rows, held-out rows and order.

    Raises:
        ValueError: if ``shares`` are not four probabilities that sum to 1.
    """

    def __init__(
        self,
        num_rows: int = 4096,
        shares: tuple[float, float, float, float] = (0.55, 0.15, 0.10, 0.20),
        batch_size: int = 16,
        val_size: int = 256,
        val_batch_size: int | None = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if len(shares) != 4 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"Invalid shares={shares}: must be four probabilities that sum to 1.")
        check_int("num_rows", num_rows, 1)
        check_int("seed", seed, 0)
        generator = torch.Generator().manual_seed(seed)

        def draw(high: int) -> int:
            return int(torch.randint(high, (), generator=generator))

        rows = []
        for _ in range(num_rows):
            prompt = " ".join(f"p{draw(5)}" for _ in range(1 + draw(4)))
            classes = torch.multinomial(torch.tensor(shares), 3 + draw(7), replacement=True, generator=generator)
            response = " ".join(f"{CLASSES[kind]}{draw(5 if kind == 3 else 7)}" for kind in classes)
            rows.append({"prompt": prompt, "response": response})
        super().__init__(
            rows,
            batch_size=batch_size,
            val_size=val_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
