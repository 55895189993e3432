"""Texts and prompts."""

from lit_methods.datamodules.text.glue import GLUEDataModule
from lit_methods.datamodules.text.prompts import PromptDataModule
from lit_methods.datamodules.text.word_game import WordGameDataModule

__all__ = ["GLUEDataModule", "PromptDataModule", "WordGameDataModule"]
