"""The paper recipes build on the meta device, from their written-out architectures, without a download."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_methods.llm import FunctionJudge, Loading, NashMP
from lit_methods.llm.language_model import word_tokenizer
from tests.unit.llm.tiny import WORDS, more_low_words

RECIPES = Path(__file__).parents[3] / "recipes" / "nash_mp"
EXPECTED = {"paper_qwen2.5-1.5b_lora": 1_543_714_304, "paper_gemma2-2b_multi_gpu": 2_614_341_888}
EXPECTED["paper_gemma2-2b_fsdp2"] = EXPECTED["paper_gemma2-2b_multi_gpu"]


@pytest.mark.parametrize("name", EXPECTED)
def test_paper_recipe_builds(name: str) -> None:
    arguments: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["model"]["init_args"]
    for replaced in ("model", "judge", "optimizer"):
        arguments.pop(replaced)
    loading = arguments["loading"]
    architecture = loading.pop("architecture")
    with torch.device("meta"):
        module = NashMP(architecture, FunctionJudge(more_low_words), word_tokenizer(WORDS), **arguments)
        module.configure_model()
    assert module.policy is not None
    base = sum(p.numel() for path, p in module.policy.named_parameters() if "lora_" not in path)
    assert base == EXPECTED[name]
    trained = sum(p.numel() for p in module.player_parameters("policy"))
    lora = "lora" in arguments
    assert trained == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert (trained < base / 4) if lora else (trained == base)
    assert {p.dtype for p in module.player_parameters("policy")} == {torch.float32}
    assert sum(p.numel() for p in module.player_parameters("target")) == trained


def test_architecture_fields_are_checked_against_the_weights(tmp_path: Path) -> None:
    from tests.unit.llm.tiny import save_tiny

    with pytest.raises(ValueError, match="num_hidden_layers=28"):
        NashMP(
            save_tiny(tmp_path), FunctionJudge(more_low_words), loading=Loading(architecture={"num_hidden_layers": 28})
        ).configure_model()
