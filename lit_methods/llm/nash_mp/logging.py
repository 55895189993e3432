"""What a step of NashMP logs besides its loss."""

import time

from torch import Tensor

from lit_methods.llm.nash_mp.preferences import Drawn


class StepTimes:
    """When the parts of a training step ended, in seconds of the process's clock."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.generated = self.judged = self.scored = self.started

    def seconds(self) -> dict[str, float]:
        """How long the parts took; ``judge`` runs beside ``score``."""
        return {
            "time/generate": self.generated - self.started,
            "time/judge": self.judged - self.generated,
            "time/score": self.scored - self.generated,
        }


def response_metrics(drawn: Drawn, entropies: Tensor) -> dict[str, Tensor]:
    """Entropy per token, mean length in tokens, and the share of responses that ended by themselves."""
    lengths = drawn.mask.sum(1)
    return {
        "entropy": entropies.sum() / lengths.sum(),
        "length/mean": lengths.float().mean(),
        "eos_rate": drawn.finished.float().mean(),
    }


def speed_metrics(times: StepTimes, drawn: Drawn, others: Drawn | None) -> dict[str, Tensor | float]:
    """Seconds and tokens per second of the parts of a step."""
    trained = drawn.mask.sum()
    generated = trained if others is None else trained + others.mask.sum()
    seconds = times.seconds()
    return {
        **seconds,
        "tokens_per_s/generated": generated / seconds["time/generate"],
        "tokens_per_s/trained": trained / seconds["time/score"],
    }
