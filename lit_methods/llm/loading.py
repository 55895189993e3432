"""Loading a causal language model, whole or as an adapter of a base, and leaving its base out of checkpoints."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
    from transformers.utils import find_adapter_config_file
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('language models need transformers: pip install "lit-methods[llm]"') from error

STATES = {"state_dict", "current_model_state"}
"""Where a checkpoint holds weights; the second only beside a weight averaging callback."""


@dataclass(frozen=True)
class Loading:
    """How a language model is loaded, and how much memory it may take.

    Attributes:
        architecture: what the configuration of a loaded model must say; checked before its weights are read.
        dtype: storage type of the weights; full fine-tuning needs ``"float32"`` (use ``precision: bf16-mixed``), LoRA
            keeps its adapters in float32.
        attn_implementation: ``"eager"``, ``"sdpa"``, ``"flash_attention_2"`` ...; ``None`` for transformers' choice.
        load_in_4bit: NF4 base weights with bfloat16 arithmetic by bitsandbytes (CUDA, LoRA only).
        gradient_checkpointing: recompute activations layer by layer. Prompts are then read again for every response.
        torch_compile: compile the decoder blocks with ``torch.compile``; what it gains was not measured.
        micro_batch_size: responses per scoring pass, 1 or more; limits memory, costs a second forward pass.
        logprob_chunk_size: response tokens per pass through the language-model head, 1 or more.

    Raises:
        ValueError: for a value outside its range.
    """

    architecture: dict[str, Any] | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    micro_batch_size: int | None = None
    logprob_chunk_size: int = 1024

    def __post_init__(self) -> None:
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype must name a type of torch, such as 'bfloat16', got {self.dtype!r}")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be >= 1, got {self.micro_batch_size}")
        if self.logprob_chunk_size < 1:
            raise ValueError(f"logprob_chunk_size must be >= 1, got {self.logprob_chunk_size}")


def load_causal_lm(model: str | Mapping[str, Any] | PreTrainedModel, loading: Loading | None = None) -> PreTrainedModel:
    """Load a causal language model, or build one with random weights.

    Args:
        model: a local folder or hub id of a model, or of a peft adapter, which is merged into the base it names; a
            mapping of configuration fields with ``model_type`` (random weights); or a model, which is returned as it
            is.
        loading: how; default: ``Loading()``.

    Raises:
        ValueError: if the configuration differs from ``architecture``, ``model_type`` is missing, or an adapter would
            have to be merged into 4-bit weights.
        OSError: if the base that an adapter names cannot be loaded.
    """
    loading = loading or Loading()
    lm = model if isinstance(model, PreTrainedModel) else _load(model, loading)
    if loading.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return lm


def _load(model: str | Mapping[str, Any], loading: Loading) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": getattr(torch, loading.dtype)}
    if loading.attn_implementation is not None:
        options["attn_implementation"] = loading.attn_implementation
    if isinstance(model, Mapping):
        return AutoModelForCausalLM.from_config(build_config(model), **options)
    adapter = adapter_base(model)
    if adapter is not None and loading.load_in_4bit:
        raise ValueError(f"load_in_4bit cannot merge the adapter {model!r}: save the merged model, and load that")
    if loading.architecture:
        found = AutoConfig.from_pretrained(adapter or model).to_dict()
        for key, expected in loading.architecture.items():
            if found.get(key) != expected:
                raise ValueError(f"architecture says {key}={expected!r}, but {model} has {found.get(key)!r}")
    if loading.load_in_4bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return from_pretrained(AutoModelForCausalLM, model, **options)


def from_pretrained(kind: Any, model: str, **options: Any) -> Any:
    """``kind.from_pretrained``, where an adapter is merged into its base instead of being left out or injected.

    Raises:
        OSError: if the base that an adapter names cannot be loaded.
    """
    base = adapter_base(model)
    if base is None:
        return kind.from_pretrained(model, **options)
    from peft import PeftModel, load_peft_weights

    if kind is AutoModelForSequenceClassification and "num_labels" not in options:
        # The adapter holds the trained head, whose size its base does not know.
        saved = load_peft_weights(model).items()
        heads = [weight.shape[0] for name, weight in saved if name.endswith((".score.weight", ".classifier.weight"))]
        options |= {"num_labels": heads[0]} if heads else {}
    try:
        lm = kind.from_pretrained(base, **options)
    except OSError as error:
        raise OSError(f"{model} is an adapter of {base!r}, which cannot be loaded: {error}") from error
    return PeftModel.from_pretrained(lm, model).merge_and_unload()


def adapter_base(model: object) -> str | None:
    """The base that a peft adapter's folder or hub id names; ``None`` for everything that is no adapter."""
    if not isinstance(model, str) or find_adapter_config_file(model) is None:
        return None
    try:
        from peft import PeftConfig
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{model} is an adapter and needs peft: pip install "lit-methods[llm]"') from error
    base = PeftConfig.from_pretrained(model).base_model_name_or_path
    if not base:
        raise ValueError(f"the adapter {model!r} names no base: set base_model_name_or_path in adapter_config.json")
    return base


def build_config(fields: Mapping[str, Any]) -> Any:
    """A ``transformers`` configuration from its fields; ``model_type`` names the family."""
    fields = dict(fields)
    if "model_type" not in fields:
        raise ValueError(f"model has no model_type among {sorted(fields)}; give the family, such as model_type: llama")
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def add_adapters(lm: nn.Module, lora: dict[str, Any], names: list[str]) -> nn.Module:
    """A peft model with the trained adapter ``default`` and equal frozen ones; their log-ratios start at zero."""
    try:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('LoRA needs peft: pip install "lit-methods[llm]"') from error
    if getattr(lm, "is_loaded_in_4bit", False):
        lm = prepare_model_for_kbit_training(lm, use_gradient_checkpointing=False)
    model = get_peft_model(lm, LoraConfig(task_type="CAUSAL_LM", **lora))
    state = dict(model.named_parameters())
    for name in names:
        model.add_adapter(name, LoraConfig(task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            for name in names:
                if f".{name}." in path and "lora_" in path:
                    parameter.copy_(state[path.replace(f".{name}.", ".default.")]).requires_grad_(False)
    model.set_adapter("default")
    return model


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, independent of their order and device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def leave_out(checkpoint: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Take weights that can be loaded again out of a checkpoint, which then holds their hash instead."""
    checkpoint["base_weights_hash"] = weights_hash(weights) if weights else None
    for key in STATES & checkpoint.keys():
        checkpoint[key] = {name: tensor for name, tensor in checkpoint[key].items() if name not in weights}


def complete(checkpoint: dict[str, Any], weights: Mapping[str, Tensor], source: object) -> None:
    """Put weights back that :func:`leave_out` took out.

    Raises:
        ValueError: if they are not the same weights.
    """
    expected = checkpoint["base_weights_hash"]
    if expected is None:
        return
    if weights_hash(weights) != expected:
        raise ValueError(
            f"the checkpoint leaves out base weights, and those of model={source!r} are not the ones it was trained "
            "on; give the same model"
        )
    for key in STATES & checkpoint.keys():
        checkpoint[key] = {**weights, **checkpoint[key]}
