"""Who is preferred to whom among drawn responses."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_methods.batches import Prompt
from lit_methods.llm.judges import query_judge


class Drawn(NamedTuple):
    """Responses as they were drawn.

    Attributes:
        tokens: ``(rows, length)``, samples of a prompt in a row, padded after the end.
        mask: tokens up to the end, which counts, ``(rows, length)``, bool.
        texts: one per row, without special tokens.
        finished: which of them ended by themselves, ``(rows,)``, bool.
    """

    tokens: Tensor
    mask: Tensor
    texts: list[str]
    finished: Tensor


def ask_preferences(
    judge: Callable[..., Any],
    prompts: Sequence[Prompt],
    mine: Drawn,
    theirs: Drawn | None,
    *,
    missing_eos_loses: bool = False,
) -> tuple[Tensor, int]:
    """Preferences of every sample of a prompt over its rivals, and the number of pairs asked for.

    Args:
        judge: who prefers what.
        prompts: ``P`` prompts.
        mine: ``B`` samples of each.
        theirs: as many samples of the opponent; ``None`` if samples of a prompt play each other, where every pair is
            asked once and its reverse follows.
        missing_eos_loses: an unfinished response loses against a finished one and ties with an unfinished one.

    Returns:
        ``(P, B, B)``, float32, on the CPU: probabilities that sample ``i`` is preferred to rival ``j``; and the number.
    """
    num = len(mine.texts) // len(prompts)
    rivals = mine if theirs is None else theirs
    if theirs is None:
        first, second = torch.triu_indices(num, num, offset=1)
    else:
        first, second = torch.cartesian_prod(torch.arange(num), torch.arange(num)).T
    offsets = torch.arange(len(prompts)).unsqueeze(1) * num
    left, right = (offsets + first).flatten(), (offsets + second).flatten()
    rows = torch.arange(len(prompts)).repeat_interleave(len(first))
    answers = query_judge(
        judge, [prompts[i] for i in rows], [mine.texts[i] for i in left], [rivals.texts[i] for i in right]
    )
    if missing_eos_loses:
        ended, other_ended = mine.finished.cpu()[left].float(), rivals.finished.cpu()[right].float()
        answers = torch.where((ended == 1) & (other_ended == 1), answers, (1 + ended - other_ended) / 2)
    pref = torch.full((len(prompts), num, num), 0.5)
    pref[:, first, second] = answers.view(len(prompts), -1)
    if theirs is None:
        pref[:, second, first] = 1.0 - answers.view(len(prompts), -1)
    return pref, len(answers)
