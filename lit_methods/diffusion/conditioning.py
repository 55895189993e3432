"""What a model may be told of a sample, and how it learns to do without (classifier-free guidance)."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn


class Conditioning(nn.Module, ABC):
    """A kind of condition, with a null value that stands for "not told".

    Args:
        dropout: probability that training replaces a condition by the null value, in [0, 1); 0 trains no unconditional
            model, so guidance is refused.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.dropout = dropout

    @abstractmethod
    def null(self, cond: Tensor) -> Tensor:
        """The null condition, shaped like ``cond``."""

    @abstractmethod
    def nulls(self, n: int) -> Tensor:
        """``n`` null conditions."""

    @abstractmethod
    def check(self, cond: Tensor) -> None:
        """Raise the ``ValueError`` that says what is wrong with a condition."""

    def drop(self, cond: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Replace each condition by the null value with probability ``dropout``."""
        if self.dropout == 0:
            return cond
        dropped = torch.rand(len(cond), generator=generator, device=cond.device) < self.dropout
        return torch.where(dropped.view(-1, *[1] * (cond.ndim - 1)), self.null(cond), cond)


class Labels(Conditioning):
    """Class labels, int64 ``(batch,)`` in ``0 .. num_classes - 1``; the null label is ``num_classes``.

    The network gets labels up to and including ``num_classes``: its embedding has one row more than there are classes.

    Args:
        num_classes: number of classes, >= 1.
        dropout: probability of the null label in training, in [0, 1).

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__(dropout)
        if num_classes < 1:
            raise ValueError(f"num_classes must be >= 1, got {num_classes}")
        self.num_classes = num_classes

    def null(self, cond: Tensor) -> Tensor:
        """``num_classes`` everywhere."""
        return torch.full_like(cond, self.num_classes)

    def nulls(self, n: int) -> Tensor:
        """``num_classes``, ``n`` times."""
        return torch.full((n,), self.num_classes)

    def check(self, cond: Tensor) -> None:
        """Integers in range; the range is looked at on the CPU only, where it costs no wait for a device."""
        if cond.is_floating_point() or cond.ndim != 1:
            raise ValueError(f"cond must be int64 labels (batch,), got {cond.dtype} {tuple(cond.shape)}")
        if cond.device.type != "cpu" or len(cond) == 0 or torch.compiler.is_compiling():
            return
        if not 0 <= int(cond.min()) <= int(cond.max()) <= self.num_classes:
            raise ValueError(
                f"cond must be labels below num_classes={self.num_classes} (or the null label, which it is), got "
                f"{int(cond.min())} to {int(cond.max())}"
            )


class Vectors(Conditioning):
    """Vectors of numbers, ``(batch, features)``; the null vector is learned.

    Args:
        features: numbers in a vector, >= 1.
        dropout: probability of the null vector in training, in [0, 1).

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, features: int, dropout: float = 0.1) -> None:
        super().__init__(dropout)
        if features < 1:
            raise ValueError(f"features must be >= 1, got {features}")
        self.null_vector = nn.Parameter(torch.zeros(features), requires_grad=dropout > 0)

    def null(self, cond: Tensor) -> Tensor:
        """The learned vector in every row."""
        return self.null_vector.to(cond.dtype).expand_as(cond)

    def nulls(self, n: int) -> Tensor:
        """The learned vector, ``n`` times."""
        return self.null_vector.expand(n, -1)

    def check(self, cond: Tensor) -> None:
        """Floating-point vectors of the right length."""
        if not cond.is_floating_point() or cond.ndim != 2 or cond.shape[1] != len(self.null_vector):
            raise ValueError(
                f"cond must be floating-point vectors (batch, {len(self.null_vector)}), got {cond.dtype} "
                f"{tuple(cond.shape)}"
            )


class Sequences(Conditioning):
    """Sequences of vectors, ``(batch, length, features)``, such as the embedded words of a prompt.

    Args:
        length: vectors in a sequence, >= 1.
        features: numbers in a vector, >= 1.
        null_file: file of the null sequence, a tensor ``(length, features)`` that ``torch.save`` wrote, such as the
            embedding of the empty prompt; ``None``: zeros.
        dropout: probability of the null sequence in training, in [0, 1).

    Raises:
        ValueError: an argument out of range, or a null sequence of another shape.
        FileNotFoundError: there is no such file.
    """

    null_sequence: Tensor

    def __init__(self, length: int, features: int, null_file: str | None = None, dropout: float = 0.1) -> None:
        super().__init__(dropout)
        if min(length, features) < 1:
            raise ValueError(f"length and features must be >= 1, got {length} and {features}")
        if null_file is not None and not Path(null_file).is_file():
            raise FileNotFoundError(
                f"null_file must be a file with a tensor ({length}, {features}); there is no {null_file}"
            )
        value = torch.zeros(length, features) if null_file is None else torch.load(null_file, weights_only=True).float()
        if value.shape != (length, features):
            raise ValueError(f"null_file must hold a tensor ({length}, {features}), got {tuple(value.shape)}")
        self.register_buffer("null_sequence", value)

    def null(self, cond: Tensor) -> Tensor:
        """The null sequence in every row."""
        return self.null_sequence.to(cond.dtype).expand_as(cond)

    def nulls(self, n: int) -> Tensor:
        """The null sequence, ``n`` times."""
        return self.null_sequence.expand(n, -1, -1)

    def check(self, cond: Tensor) -> None:
        """Floating-point sequences of the right length."""
        if not cond.is_floating_point() or cond.shape[1:] != self.null_sequence.shape:
            wanted = ", ".join(map(str, self.null_sequence.shape))
            raise ValueError(f"cond must be floating-point (batch, {wanted}), got {cond.dtype} {tuple(cond.shape)}")
