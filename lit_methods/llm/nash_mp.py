"""Nash-MP and Nash Prox: fine-tuning a language model towards the Nash equilibrium of a preference game."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_methods.batches import Prompt, PromptBatch
from lit_methods.hyperparameters import live_arguments
from lit_methods.llm.judges import query_judge
from lit_methods.llm.language_model import (
    EncodedPrompts,
    LanguageModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    add_adapters,
    complete,
    encode_prompts,
    encode_responses,
    end_token_ids,
    leave_out,
    load_causal_lm,
    load_tokenizer,
)
from lit_methods.llm.logprobs import response_mask
from lit_methods.llm.nash_loss import KLCredit, LossType, nash_prox_loss
from lit_methods.llm.sampling import Generation, LocalSampler, Player, Sampler

Opponent = Literal["group", "policy", "reference", "mixture"]


class NashMP(LightningModule):
    r"""Online preference learning against any pairwise judge: no scalar reward, stable where self-play cycles.

    Fine-tunes a policy towards the equilibrium of the game in which it wants to be preferred to its opponent and to
    stay near the reference: :math:`P(\pi \succ \pi') - \beta KL(\pi | ref) + \beta KL(\pi' | ref)`. Each optimizer step
    is a stochastic policy-gradient step on the prox problem :math:`P(\pi \succ o) - \beta KL(\pi | ref) -
    (\beta / \eta) KL(\pi | target)`, whose pull towards a slowly moving target damps the rotation of self-play.

    Source: Tiapkin et al., arXiv 2505.19731 (v1 "Nash-MP", v2 "Nash Prox"). The prox step is the papers'; the outer
    loops over a parametric policy are a reconstruction from their abstracts, and the default values of ``eta``,
    ``kappa``, ``samples_per_prompt`` and of the LoRA learning rate are this library's choice.

    Two drivers:

    - ``mode="prox"``: the target is a moving average of the policy (or a hard copy every ``inner_steps``). By default
      the samples of a prompt play each other: one set of responses serves as both players.
    - ``mode="mirror_prox"``: ``inner_steps`` steps against the target itself, a copy is frozen as the opponent, then
      ``inner_steps`` steps against that copy around the same target, which then becomes the policy.

    ``eta=inf`` is regularised self-play (Online IPO with ``loss_type="ipo"``), ``opponent="mixture"`` with it is
    Nash-MD with policy gradients, and ``opponent="reference"`` is a best response to the reference.

    With ``lora`` the reference is the model with its adapters off, and the target (and opponent) are further adapters;
    without, they are frozen copies. The model is built in ``configure_model``. Batches are
    :class:`~lit_methods.batches.PromptBatch`. Randomness is a function of (``seed``, rank, number of batches seen).
    Dropout is switched off, because sampling and scoring must see one policy. The judge answers in a thread of its own
    while reference and target score. Runs on one device, under DDP, and, for
    full fine-tuning, under ``ModelParallelStrategy(data_parallel_size=N, tensor_parallel_size=1)`` (FSDP2: policy and
    frozen copies are sharded over the ranks).

    Logs ``train/loss`` at every step, and at the trainer's logging steps ``train/...``: ``kl/ref``, ``kl/ref_k3``,
    ``kl/target``, ``entropy``, ``preference/spread``, ``win_rate/opponent`` (separate opponents only), ``length/mean``,
    ``eos_rate``, ``grad_norm``, ``judge/pairs``, ``tokens_per_s/{generated,trained}`` and
    ``time/{generate,judge,score,train}`` (``judge`` runs beside ``score``; ``train`` is the backward pass). Further
    ``{val,test}/...``: ``kl/ref``, ``entropy``, ``length/mean``, ``eos_rate``; win rates come from ``WinRate``.

    Args:
        model: folder or hub id of a causal language model; configuration fields with ``model_type`` for random weights;
            or a ``transformers`` model.
        judge: who prefers what: a :class:`~lit_methods.llm.judges.PairwiseJudge`, such as those of
            :mod:`lit_methods.llm.judges`.
        tokenizer: folder, hub id, ``{"words": [...]}`` or a tokenizer; default: that of ``model``.
        reference: folder or hub id of another model of the same vocabulary to stay near; default: the policy's start.
        reference_dtype: storage type of a reference that has weights of its own; default: ``dtype``.
        offload_reference: keep the reference's own weights on the CPU except while they score.
        mode: driver of the outer loop.
        opponent: who the policy plays in ``mode="prox"``: its other samples of the same prompt (``"group"``), separate
            samples of itself, of the reference, or of the token-level geometric mixture of both.
        beta: strength of the KL regularisation, positive.
        eta: step size of the prox step, positive; ``inf`` for no target.
        kappa: share of the policy that enters the target after each optimizer step, in ``(0, 1]``.
        inner_steps: optimizer steps per phase of ``"mirror_prox"`` (default 10); in ``"prox"``, copy the policy into
            the target every so many steps instead of averaging.
        samples_per_prompt: responses drawn per prompt, 2 or more; as many of a separate opponent.
        loss_type: ``"reinforce"`` (policy gradient) or ``"ipo"`` (contrastive); the same expected gradient.
        kl_credit: see :func:`~lit_methods.llm.nash_loss.nash_prox_loss`.
        mixture: weight of the reference in ``opponent="mixture"``, in ``(0, 1)``.
        missing_eos_loses: an unfinished response loses against a finished one and ties with an unfinished one.
        max_new_tokens: longest response.
        temperature: sampling temperature; the policy that is trained is the tempered one.
        top_k: draw among so many tokens, 0 for all; anything else biases the gradient.
        top_p: draw among tokens of this total probability; less than 1 biases the gradient.
        eos_token_ids: tokens that end a response; default: the tokenizer's, the generation config's and the one that
            closes an assistant turn in the chat template.
        max_prompt_length: longer prompts lose their beginning.
        lora: fields of ``peft.LoraConfig``; ``None`` for full fine-tuning. Dropout must be 0.
        architecture: what the configuration of a loaded model must say, see
            :func:`~lit_methods.llm.language_model.load_causal_lm`.
        dtype: storage type of the model; full fine-tuning needs ``"float32"`` (use ``precision: bf16-mixed``), LoRA
            keeps its adapters in float32.
        attn_implementation: see ``transformers``.
        gradient_checkpointing: recompute activations layer by layer.
        load_in_4bit: NF4 base weights by bitsandbytes (CUDA, LoRA only).
        torch_compile: compile the decoder blocks, see ``torch.compile``; what it gains was not measured.
        micro_batch_size: responses per scoring pass; limits memory, costs a second forward pass.
        logprob_chunk_size: response tokens per pass through the language-model head.
        sampler: who draws responses; default: :class:`~lit_methods.llm.sampling.LocalSampler`.
        seed: seed of the responses.
        optimizer: builds the optimizer from the trained parameters.
        warmup_steps: optimizer steps over which the learning rate rises linearly.

    Raises:
        ValueError: for an argument outside its range, or a combination that cannot work.
    """

    def __init__(
        self,
        model: str | dict[str, Any] | PreTrainedModel,
        judge: Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], Any],
        tokenizer: str | dict[str, Any] | PreTrainedTokenizerBase | None = None,
        reference: str | None = None,
        reference_dtype: str | None = None,
        offload_reference: bool = False,
        mode: Literal["prox", "mirror_prox"] = "prox",
        opponent: Opponent = "group",
        beta: float = 0.1,
        eta: float = 0.25,
        kappa: float = 0.1,
        inner_steps: int | None = None,
        samples_per_prompt: int = 4,
        loss_type: LossType = "reinforce",
        kl_credit: KLCredit = "sequence",
        mixture: float = 0.125,
        missing_eos_loses: bool = False,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_ids: list[int] | None = None,
        max_prompt_length: int | None = None,
        lora: dict[str, Any] | None = None,
        architecture: dict[str, Any] | None = None,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        load_in_4bit: bool = False,
        torch_compile: bool = False,
        micro_batch_size: int | None = None,
        logprob_chunk_size: int = 1024,
        sampler: Sampler | None = None,
        seed: int = 0,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.01),
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be positive and finite, got {beta}")
        if not eta > 0:
            raise ValueError(f"eta must be positive, or inf for no target, got {eta}")
        if not 0 < kappa <= 1:
            raise ValueError(f"kappa must be in (0, 1], got {kappa}")
        if samples_per_prompt < 2:
            raise ValueError(f"samples_per_prompt must be 2 or more, got {samples_per_prompt}")
        if inner_steps is not None and inner_steps < 1:
            raise ValueError(f"inner_steps must be 1 or more, got {inner_steps}")
        if not 0 < mixture < 1:
            raise ValueError(f"mixture must be in (0, 1), got {mixture}")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be 1 or more, got {micro_batch_size}")
        if mode == "mirror_prox" and (opponent != "group" or math.isinf(eta)):
            raise ValueError("mode='mirror_prox' chooses its own opponent and needs a finite eta; leave opponent out")
        if lora is None and dtype != "float32":
            raise ValueError(
                f"dtype={dtype!r} would round away small updates in full fine-tuning; use float32 with "
                "trainer.precision: bf16-mixed, or lora"
            )
        if lora is None and load_in_4bit:
            raise ValueError("load_in_4bit needs lora: quantised weights cannot be trained")
        if lora is not None and lora.get("lora_dropout", 0.0):
            raise ValueError(
                f"lora_dropout must be 0, got {lora['lora_dropout']}: responses are drawn and scored by one policy"
            )
        if lora is not None and (lora.get("modules_to_save") or lora.get("bias", "none") != "none"):
            raise ValueError("lora must train adapters only: leave modules_to_save out and bias at 'none'")
        if lora is not None and reference is None and (offload_reference or reference_dtype):
            raise ValueError(
                "offload_reference and reference_dtype need a reference with weights of its own: under lora it is the "
                "base model without adapters; leave them out, or set reference"
            )
        if loss_type == "reinforce" and (top_k or top_p < 1):
            warnings.warn("top_k and top_p draw from another distribution than the one scored: biased gradients")
        if tokenizer is None and not isinstance(model, str):
            raise ValueError("tokenizer must be given when model is not a folder or hub id")
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.judge = judge
        self.reference = reference
        self.reference_dtype = reference_dtype
        self.offload_reference = offload_reference
        self.mode = mode
        self.opponent = opponent
        self.beta = beta
        self.eta = eta
        self.kappa = kappa
        self.inner_steps = 10 if mode == "mirror_prox" and inner_steps is None else inner_steps
        self.samples_per_prompt = samples_per_prompt
        self.loss_type: LossType = loss_type
        self.kl_credit: KLCredit = kl_credit
        self.mixture = mixture
        self.missing_eos_loses = missing_eos_loses
        self.max_prompt_length = max_prompt_length
        self.lora = lora
        self.gradient_checkpointing = gradient_checkpointing
        self.torch_compile = torch_compile
        self.micro_batch_size = micro_batch_size
        self.logprob_chunk_size = logprob_chunk_size
        self.sampler: Sampler = sampler or LocalSampler()
        self.seed = seed
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.tokenizer = load_tokenizer(model if tokenizer is None else tokenizer)  # type: ignore[arg-type]
        self._model = model
        self._loading: dict[str, Any] = {
            "architecture": architecture,
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "load_in_4bit": load_in_4bit,
        }
        pad = self.tokenizer.pad_token_id
        # checked here, completed with the model's own end tokens in configure_model
        self.generation = Generation(
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids or [self.tokenizer.eos_token_id],
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        self._given_ends = eos_token_ids
        self.policy: LanguageModel | None = None
        self.frozen = nn.ModuleDict()
        self.base_changed = False  # the base no longer is what its folder says: checkpoints carry it
        self.phase = 0  # of mirror_prox: 0 against the target, 1 against the frozen opponent
        self.inner_step = 0
        self.batches_seen = 0
        self._scored = 0.0  # when the loss was ready

    # ---------------------------------------------------------------- model

    @property
    def frozen_players(self) -> list[str]:
        """Names of the players besides the policy that have weights of their own."""
        names = [] if math.isinf(self.eta) else ["target"]
        return [*names, "opponent"] if self.mode == "mirror_prox" else names

    def configure_model(self) -> None:
        """Load the model once and add adapters or frozen copies."""
        if self.policy is not None:
            return
        lm: nn.Module = load_causal_lm(self._model, **self._loading)
        ends = self._given_ends or end_token_ids(lm, self.tokenizer)  # type: ignore[arg-type]
        self.generation = replace(self.generation, eos_token_ids=ends)
        if self.gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        if self.reference is not None:
            loading = {**self._loading, "architecture": None, "load_in_4bit": False}
            self.frozen["reference"] = self._wrap(load_causal_lm(self.reference, **loading))
        elif self.lora is None:
            self.frozen["reference"] = self._wrap(deepcopy(lm))
        if self.lora is None:
            lm.requires_grad_(True)
            for name in self.frozen_players:
                self.frozen[name] = self._wrap(deepcopy(lm))
        else:
            lm = add_adapters(lm, self.lora, self.frozen_players)
        self.frozen.requires_grad_(False)
        if self.reference_dtype is not None:
            self.frozen["reference"].to(getattr(torch, self.reference_dtype))
        self.policy = self._wrap(lm)
        if self._device_mesh is not None:
            if self.offload_reference:
                raise ValueError("offload_reference does not work with ModelParallelStrategy (FSDP2), which shards it")
            if self.lora is not None:
                raise ValueError("lora does not work with ModelParallelStrategy (FSDP2); use strategy: ddp")
            if self._device_mesh["tensor_parallel"].size() > 1:
                raise ValueError(
                    "tensor parallelism is not supported: set data_parallel_size of ModelParallelStrategy to the "
                    "number of devices, tensor_parallel_size to 1 (its defaults are the other way round)"
                )
            for model in (self.policy, *self.frozen.values()):
                model.shard(self._device_mesh["data_parallel"])  # type: ignore[operator]

    def _wrap(self, lm: nn.Module) -> LanguageModel:
        model = LanguageModel(lm, temperature=self.generation.temperature, chunk_size=self.logprob_chunk_size)
        if self.torch_compile:
            for block in model.blocks():
                block.compile(dynamic=True)
        return model.train()  # as Lightning expects it; from_pretrained gives evaluation mode

    @contextmanager
    def player(self, name: str) -> Iterator[LanguageModel]:
        """The language model acting as ``"policy"``, ``"reference"``, ``"target"`` or ``"opponent"``.

        All but the policy are for use without gradients, and only inside the context.
        """
        assert self.policy is not None, "configure_model has not run"
        if name == "policy":
            yield self.policy
            return
        if name not in ("reference", *self.frozen_players):
            raise ValueError(f"there is no player {name!r} with mode={self.mode!r} and eta={self.eta}")
        if torch.is_grad_enabled():
            raise RuntimeError(f"player {name!r} is frozen: use it under torch.no_grad()")
        if name in self.frozen:
            model: Any = self.frozen[name]
            offload = self.offload_reference and name == "reference"
            try:
                yield model.to(self.device) if offload else model
            finally:
                if offload:
                    model.to("cpu")
            return
        lm: Any = self.policy.lm
        if name == "reference":
            with lm.disable_adapter():
                yield self.policy
            return
        lm.set_adapter(name, inference_mode=True)
        try:
            yield self.policy
        finally:
            lm.set_adapter("default")

    def player_parameters(self, name: str) -> list[nn.Parameter]:
        """The weights that make a player: its adapter, or all of its model; in one order for all players."""
        assert self.policy is not None, "configure_model has not run"
        if self.lora is None:
            return list((self.policy if name == "policy" else self.frozen[name]).parameters())
        key = f".{'default' if name == 'policy' else name}."
        return [parameter for path, parameter in self.policy.named_parameters() if "lora_" in path and key in path]

    @torch.no_grad()
    def move_player(self, name: str, share: float = 1.0) -> None:
        """Move a frozen player towards the policy: ``weights <- (1 - share) weights + share policy``."""
        for mine, policy in zip(self.player_parameters(name), self.player_parameters("policy"), strict=True):
            mine.lerp_(policy.to(mine), share)

    @torch.no_grad()
    def restart_from_policy(self) -> None:
        """Make the present weights the reference and the start of every player (after a supervised warm-up)."""
        self.base_changed = True
        moved = ["reference"] if self.lora is None and self.reference is None else []
        for name in [*moved, *self.frozen_players]:
            self.move_player(name)

    # ---------------------------------------------------------------- one step

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """Sample, judge, score; returns the loss of the prox step."""
        started = time.perf_counter()
        prompts = self.encode(batch.prompts)
        num = self.samples_per_prompt
        generator = self._generator(self.batches_seen)
        self.batches_seen += 1
        players, grouped = self._opponents()
        responses = self._sample([("policy", 1.0)], prompts, num, generator)
        others = None if grouped else self._sample(players, prompts, num, generator)
        generated = time.perf_counter()

        mask = self._response_mask(responses)
        with ThreadPoolExecutor(1) as pool:
            judging = pool.submit(
                lambda: (*self._preferences(batch.prompts, responses, mask, others), time.perf_counter())
            )
            with torch.no_grad(), self._evaluating():
                ref_logps = self._score("reference", prompts, responses, mask)[0]
                target_logps = None if math.isinf(self.eta) else self._score("target", prompts, responses, mask)[0]
            pref, num_pairs, judged = judging.result()
        logps, entropies = self._score("policy", prompts, responses, mask)
        groups = (len(batch.prompts), num, -1)
        loss, metrics = nash_prox_loss(
            logps.view(groups),
            ref_logps.view(groups),
            None if target_logps is None else target_logps.view(groups),
            pref.to(logps),
            mask.view(groups),
            beta=self.beta,
            eta=self.eta,
            loss_type=self.loss_type,
            group_self_play=grouped,
            kl_credit=self.kl_credit,
        )
        self._scored = scored = time.perf_counter()

        logged: dict[str, Tensor | float] = {"loss": loss.detach()}
        if self._logging_now():
            num_tokens = mask.sum()
            drawn = num_tokens if others is None else num_tokens + self._response_mask(others).sum()
            if not grouped:
                metrics["win_rate/opponent"] = pref.mean()
            logged |= {
                **metrics,
                "entropy": entropies.sum() / num_tokens,
                "length/mean": mask.sum(1).float().mean(),
                "eos_rate": self._finished(responses, mask).float().mean(),
                "judge/pairs": float(num_pairs),
                "time/generate": generated - started,
                "time/judge": judged - generated,
                "time/score": scored - generated,
                "tokens_per_s/generated": drawn / (generated - started),
                "tokens_per_s/trained": num_tokens / (scored - generated),
            }
        self._log("train", logged, len(batch.prompts))
        return loss

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Answer every held-out prompt once, always with the same seeds.

        Returns:
            ``prompts``, ``rows``, ``responses`` as texts and ``lengths`` in tokens; for
            :class:`~lit_methods.callbacks.WinRate` and :class:`~lit_methods.callbacks.SampleTable`.
        """
        return self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """As :meth:`validation_step`."""
        return self._evaluate(batch, batch_idx, "test")

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[str]:
        """One response of the policy per prompt."""
        return self.respond(batch.prompts, seed=batch_idx)[0]

    def _evaluate(self, batch: PromptBatch, batch_idx: int, stage: str) -> dict[str, Any]:
        prompts = self.encode(batch.prompts)
        responses = self._sample([("policy", 1.0)], prompts, 1, self._generator(batch_idx, stream=1))
        mask = self._response_mask(responses)
        texts = self.decode(responses, mask)
        with torch.no_grad():
            logps, entropies = self._score("policy", prompts, responses, mask)
            ref_logps, _ = self._score("reference", prompts, responses, mask)
        lengths = mask.sum(1)
        metrics = {
            "kl/ref": (logps - ref_logps).sum(1).mean(),
            "entropy": entropies.sum() / lengths.sum(),
            "length/mean": lengths.float().mean(),
            "eos_rate": self._finished(responses, mask).float().mean(),
        }
        self._log(stage, metrics, len(texts))
        return {
            "prompts": batch.prompts,
            "rows": batch.rows,
            "responses": texts,
            "lengths": lengths.tolist(),
        }

    @torch.no_grad()
    def respond(self, prompts: list[Prompt], player: str = "policy", seed: int = 0) -> tuple[list[str], list[int]]:
        """One response per prompt and its length in tokens.

        Args:
            prompts: the prompts.
            player: ``"policy"``, ``"reference"``, ``"target"`` or ``"opponent"``.
            seed: of the draw, along with the module's own seed and the rank; each player has a stream of its own.
        """
        stream = 2 + ("policy", "reference", "target", "opponent").index(player)
        responses = self._sample([(player, 1.0)], self.encode(prompts), 1, self._generator(seed, stream))
        mask = self._response_mask(responses)
        return self.decode(responses, mask), mask.sum(1).tolist()

    def encode(self, prompts: list[Prompt]) -> EncodedPrompts:
        """Tokenise prompts onto the module's device."""
        return encode_prompts(self.tokenizer, prompts, max_length=self.max_prompt_length, device=self.device)

    def decode(self, responses: Tensor, mask: Tensor) -> list[str]:
        """Texts of responses, without special tokens."""
        rows = [row[:length] for row, length in zip(responses.tolist(), mask.sum(1).tolist(), strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def supervised_loss(self, prompts: list[Prompt], responses: list[str]) -> Tensor:
        """Mean negative log-probability of wanted response tokens, the end included; for a supervised warm-up."""
        assert self.policy is not None, "configure_model has not run"
        rows, mask = encode_responses(self.tokenizer, responses, self.generation.pad_token_id, self.device)
        logps, _ = self.policy.score(self.encode(prompts), rows, mask)
        return -logps.sum() / mask.sum()

    def _opponents(self) -> tuple[list[tuple[str, float]], bool]:
        """Who is played, as (player, weight), and whether it is the policy's own group of samples."""
        if self.mode == "mirror_prox":
            return [("target" if self.phase == 0 else "opponent", 1.0)], False
        mixed = [("policy", 1.0 - self.mixture), ("reference", self.mixture)]
        return mixed if self.opponent == "mixture" else [(self.opponent, 1.0)], self.opponent == "group"

    def _sample(
        self, players: list[tuple[str, float]], prompts: EncodedPrompts, num: int, generator: torch.Generator
    ) -> Tensor:
        def seat(name: str) -> Player:
            return lambda: self.player(name)

        with torch.no_grad(), self._evaluating():
            seats = [(seat(name), weight) for name, weight in players]
            return self.sampler(seats, prompts, num, self.generation, generator)

    def _score(self, name: str, prompts: EncodedPrompts, responses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        with self.player(name) as model:
            return model.score(prompts, responses, mask, micro_batch_size=self.micro_batch_size)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """No gradient checkpointing, so that caches may be used. Nothing else depends on the mode: dropout is off."""
        assert self.policy is not None, "configure_model has not run"
        if not self.policy.checkpointing:
            yield
            return
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    def _response_mask(self, responses: Tensor) -> Tensor:
        return response_mask(responses, self.generation.eos_token_ids)

    def _finished(self, responses: Tensor, mask: Tensor) -> Tensor:
        ends = torch.tensor(self.generation.eos_token_ids, device=responses.device)
        return (torch.isin(responses, ends) & mask).any(1)

    def _preferences(
        self, prompts: list[Prompt], responses: Tensor, mask: Tensor, others: Tensor | None
    ) -> tuple[Tensor, int]:
        """Preferences of every sample over its rivals, ``(P, B, B)`` or ``(P, B, K)``, and the pairs asked for."""
        num = self.samples_per_prompt
        texts = self.decode(responses, mask)
        finished = self._finished(responses, mask)
        if others is None:
            rival_texts, rival_finished = texts, finished
            first, second = torch.triu_indices(num, num, offset=1)
        else:
            rival_mask = self._response_mask(others)
            rival_texts, rival_finished = self.decode(others, rival_mask), self._finished(others, rival_mask)
            first, second = torch.cartesian_prod(torch.arange(num), torch.arange(num)).T
        offsets = torch.arange(len(prompts)).unsqueeze(1) * num
        left, right = (offsets + first).flatten(), (offsets + second).flatten()
        rows = torch.arange(len(prompts)).repeat_interleave(len(first))
        answers = query_judge(
            self.judge,
            [prompts[i] for i in rows],
            [texts[i] for i in left],
            [rival_texts[i] for i in right],
        )
        if self.missing_eos_loses:
            mine, theirs = finished.cpu()[left].float(), rival_finished.cpu()[right].float()
            answers = torch.where((mine == 1) & (theirs == 1), answers, (1 + mine - theirs) / 2)
        pref = torch.full((len(prompts), num, num), 0.5)
        pref[:, first, second] = answers.view(len(prompts), -1)
        if others is None:
            pref[:, second, first] = 1.0 - answers.view(len(prompts), -1)
        return pref.to(self.device), len(answers)

    def _generator(self, count: int, stream: int = 0) -> torch.Generator:
        """Random numbers as a function of (seed, rank, stream, count), so that nothing needs to be checkpointed."""
        seed = hash((self.seed, self.global_rank, stream, count)) % 2**63
        return torch.Generator(self.device).manual_seed(seed)

    def _logging_now(self) -> bool:
        """Whether the trainer's loggers write at this step; logging costs more than a tiny model's backward pass."""
        if self._trainer is None:
            return True
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    def _log(self, stage: str, metrics: Mapping[str, Tensor | float], batch_size: int) -> None:
        if self._trainer is None:
            return
        named = {f"{stage}/{name}": value for name, value in metrics.items()}
        self.log_dict(named, batch_size=batch_size, sync_dist=self.trainer.world_size > 1)

    # ---------------------------------------------------------------- optimisation

    def configure_optimizers(self) -> Any:
        """The injected optimizer over the policy's weights, with a linear warm-up."""
        optimizer = self.optimizer(self.player_parameters("policy"))
        if not self.warmup_steps:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Refuse trained weights in a type that would round their updates and averages away."""
        dtypes = {parameter.dtype for parameter in self.player_parameters("policy")}
        if not dtypes <= {torch.float32, torch.float64}:
            raise ValueError(
                f"trained weights are {dtypes}, which rounds small updates away; use trainer.precision: bf16-mixed"
            )

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Log the gradient's norm before clipping, and the time since the loss."""
        if self._logging_now():
            grads = [p.grad for p in self.player_parameters("policy") if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            self._log("train", {"grad_norm": norm, "time/train": time.perf_counter() - self._scored}, 1)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then move the target: only if the optimizer really stepped (a gradient scaler may skip it)."""
        stepped: list[bool] = []
        inner = getattr(optimizer, "optimizer", optimizer)
        hook = inner.register_step_post_hook(lambda *_: stepped.append(True))
        try:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        finally:
            hook.remove()
        if stepped:
            self.advance()

    def advance(self) -> None:
        """What happens to the frozen players after an optimizer step."""
        self.inner_step += 1
        if self.mode == "prox":
            if math.isinf(self.eta):
                return
            if self.inner_steps is None:
                self.move_player("target", self.kappa)
            elif self.inner_step % self.inner_steps == 0:
                self.move_player("target")
        elif self.inner_step % (self.inner_steps or 1) == 0:
            self.move_player("opponent" if self.phase == 0 else "target")
            self.phase = 1 - self.phase

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters; leave out weights that can be loaded again, and keep their hash."""
        checkpoint["nash_mp"] = {
            "phase": self.phase,
            "inner_step": self.inner_step,
            "batches_seen": self.batches_seen,
            "base_changed": self.base_changed,
        }
        leave_out(checkpoint, self._reloadable(checkpoint["state_dict"]))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters; complete the weights from the model, if it is the one that was trained."""
        state = checkpoint["nash_mp"]
        self.phase = state["phase"]
        self.inner_step = state["inner_step"]
        self.batches_seen = state["batches_seen"]
        self.base_changed = state["base_changed"]
        complete(checkpoint, self._reloadable(self.state_dict()), self._model)

    def _reloadable(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of a state dict that is in the model's folder: the base under LoRA, else the reference."""
        if not isinstance(self._model, str) or self.base_changed or self._device_mesh is not None:
            return {}
        if self.lora is None:
            return {name: tensor for name, tensor in state.items() if name.startswith("frozen.reference.")}
        return {name: tensor for name, tensor in state.items() if name.startswith("policy.") and "lora_" not in name}
