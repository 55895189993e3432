"""Fine-tuning language models: Nash learning from preferences, judges, supervised fine-tuning."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.llm.judges import (
        EnsembleJudge,
        FunctionJudge,
        HTTPJudge,
        PairwiseJudge,
        PairwiseModelJudge,
        RewardModelJudge,
        ScoreJudge,
    )
    from lit_methods.llm.nash_loss import nash_prox_loss
    from lit_methods.llm.nash_mp import NashMP
    from lit_methods.llm.sampling import LocalSampler, Sampler, VLLMSampler
    from lit_methods.llm.sequence_classification import SequenceClassification
    from lit_methods.llm.sft import SupervisedFineTuning

__all__ = [
    "EnsembleJudge",
    "FunctionJudge",
    "HTTPJudge",
    "LocalSampler",
    "NashMP",
    "PairwiseJudge",
    "PairwiseModelJudge",
    "RewardModelJudge",
    "Sampler",
    "ScoreJudge",
    "SequenceClassification",
    "SupervisedFineTuning",
    "VLLMSampler",
    "nash_prox_loss",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "EnsembleJudge": "judges",
        "FunctionJudge": "judges",
        "HTTPJudge": "judges",
        "LocalSampler": "sampling",
        "NashMP": "nash_mp",
        "PairwiseJudge": "judges",
        "PairwiseModelJudge": "judges",
        "RewardModelJudge": "judges",
        "Sampler": "sampling",
        "ScoreJudge": "judges",
        "SequenceClassification": "sequence_classification",
        "SupervisedFineTuning": "sft",
        "VLLMSampler": "sampling",
        "nash_prox_loss": "nash_loss",
    },
)
