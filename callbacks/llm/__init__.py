"""Callbacks for language models."""

from lit_methods.callbacks.llm.export_hf import ExportHF
from lit_methods.callbacks.llm.sample_table import SampleTable
from lit_methods.callbacks.llm.sft_warmup import SFTWarmup
from lit_methods.callbacks.llm.win_rate import WinRate

__all__ = ["ExportHF", "SFTWarmup", "SampleTable", "WinRate"]
