"""Random numbers that are a pure function of where they are drawn."""

import hashlib

import torch


def stream(device: torch.device | str, *place: int | str) -> torch.Generator:
    """A generator whose numbers depend on ``place`` only, such as ``(seed, rank, "train", step)``.

    With one seed on all ranks, as Lightning's ``seed_everything`` sets it, ranks draw different numbers all the same;
    and a run resumes exactly once it knows its seed and step.
    """
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


def new_seed() -> int:
    """A seed from torch's global generator."""
    return int(torch.randint(2**62, (), dtype=torch.int64))


def check_seed(seed: int | None) -> int:
    """The seed, or a new one for ``None``.

    Raises:
        ValueError: it is negative.
    """
    if seed is not None and seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    return new_seed() if seed is None else seed
