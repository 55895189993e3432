"""Fine-tuning language models: classification of texts."""

from typing import TYPE_CHECKING

from lit_methods._lazy import lazy_exports

if TYPE_CHECKING:
    from lit_methods.llm.sequence_classification import SequenceClassification

__all__ = [
    "SequenceClassification",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "SequenceClassification": "sequence_classification",
    },
)
