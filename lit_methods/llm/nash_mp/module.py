"""Nash-MP and Nash Prox: fine-tuning a language model towards the Nash equilibrium of a preference game."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_methods.batches import Prompt, PromptBatch
from lit_methods.hyperparameters import as_fields, live_arguments, move_arguments
from lit_methods.llm.averaging import refuse_swa, restore_frozen, restore_frozen_in
from lit_methods.llm.background import in_background
from lit_methods.llm.language_model import (
    EncodedPrompts,
    LanguageModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    encode_prompts,
    encode_responses,
    end_token_ids,
    load_tokenizer,
)
from lit_methods.llm.loading import Loading, adapter_base, complete, leave_out, load_causal_lm
from lit_methods.llm.logprobs import response_mask
from lit_methods.llm.nash_mp.logging import StepTimes, response_metrics, speed_metrics
from lit_methods.llm.nash_mp.loss import LossType, nash_prox_loss
from lit_methods.llm.nash_mp.players import MirrorProx, Prox, Reference, acting, build_players
from lit_methods.llm.nash_mp.preferences import Drawn, ask_preferences
from lit_methods.llm.sampling import Generation, LocalSampler, Player, Sampler

MOVED = {
    **{f"{name}": f"generation.{name}" for name in Generation.__dataclass_fields__ if name != "pad_token_id"},
    **{f"{name}": f"loading.{name}" for name in Loading.__dataclass_fields__},
    "reference_dtype": "reference.dtype",
    "offload_reference": "reference.offload",
    "kappa": "mode.kappa",
    "opponent": "mode.opponent",
    "mixture": "mode.mixture",
    "inner_steps": "mode.inner_steps",
}
"""Arguments of version 0.0 -> where their values belong now."""


class NashMP(LightningModule):
    r"""Online preference learning against any pairwise judge: no scalar reward, stable where self-play cycles.

    Fine-tunes a policy towards the equilibrium of the game in which it wants to be preferred to its opponent and to
    stay near the reference: :math:`P(\pi \succ \pi') - \beta KL(\pi | ref) + \beta KL(\pi' | ref)`. Each optimizer step
    is a stochastic policy-gradient step on the prox problem :math:`P(\pi \succ o) - \beta KL(\pi | ref) -
    (\beta / \eta) KL(\pi | target)`, whose pull towards a slowly moving target damps the rotation of self-play.
    Use it where preferences come from a judge and may be intransitive. Where they come from one reliable score, a
    policy gradient on the score does the same with fewer forward passes.

    Example:
        >>> def shorter(prompts, a, b):
        ...     return [0.9 if len(x) < len(y) else 0.1 for x, y in zip(a, b)]
        >>> NashMP("Qwen/Qwen2.5-0.5B-Instruct", shorter, lora={"r": 16}, generation=Generation(max_new_tokens=128))

    Source: Tiapkin et al., arXiv 2505.19731 (v1 "Nash-MP", v2 "Nash Prox"). The prox step is the papers'; the outer
    loops over a parametric policy are a reconstruction from their abstracts, and the default values of ``eta``,
    ``mode``, ``samples_per_prompt`` and of the LoRA learning rate are this library's choice.

    ``eta=inf`` is regularised self-play (Online IPO with ``loss_type="ipo"``), ``Prox(opponent="mixture")`` with it is
    Nash-MD with policy gradients, and ``Prox(opponent="reference")`` is a best response to the reference.

    With ``lora`` the reference is the model with its adapters off, and the target (and opponent) are further adapters;
    without, they are frozen copies. The model is built in ``configure_model``. Batches are
    :class:`~lit_methods.batches.PromptBatch`. Randomness is a function of (``generation.seed``, rank, number of batches
    seen). Dropout is switched off, because sampling and scoring must see one policy. The judge answers in a thread of
    its own while reference and target score. Runs on one device, under DDP, and, for full fine-tuning, under
    ``ModelParallelStrategy(data_parallel_size=N, tensor_parallel_size=1)`` (FSDP2: policy and frozen copies are sharded
    over the ranks). Weight averaging callbacks average the policy and nothing else.

    Logs ``train/loss`` at every step, and at the trainer's logging steps ``train/...``: ``kl/ref``, ``kl/ref_k3``,
    ``kl/target``, ``entropy``, ``preference/spread``, ``win_rate/opponent`` (separate opponents only), ``length/mean``,
    ``eos_rate``, ``grad_norm``, ``judge/pairs``, ``tokens_per_s/{generated,trained}`` and
    ``time/{generate,judge,score,train}`` (``judge`` runs beside ``score``; ``train`` is the backward pass). Further
    ``{val,test}/...``: ``kl/ref``, ``entropy``, ``length/mean``, ``eos_rate``; win rates come from ``WinRate``.

    Args:
        model: folder or hub id of a causal language model, or of an adapter, which is merged into its base before
            training; configuration fields with ``model_type`` for random weights; or a ``transformers`` model.
        judge: who prefers what: a :class:`~lit_methods.llm.judges.PairwiseJudge`, such as those of
            :mod:`lit_methods.llm.judges`.
        tokenizer: folder, hub id, ``{"words": [...]}`` or a tokenizer; default: that of ``model``.
        reference: folder or hub id of another model of the same vocabulary to stay near, or a
            :class:`~lit_methods.llm.Reference`; default: the policy's start.
        lora: fields of ``peft.LoraConfig``; ``None`` for full fine-tuning. Dropout must be 0.
        mode: how the target moves: :class:`~lit_methods.llm.Prox` or :class:`~lit_methods.llm.MirrorProx`, or
            ``"prox"`` or ``"mirror_prox"`` for their defaults.
        beta: strength of the KL regularisation, positive.
        eta: step size of the prox step, positive; ``inf`` for no target.
        samples_per_prompt: responses drawn per prompt, 2 or more; as many of a separate opponent.
        loss_type: estimator of the gradient: ``"reinforce"`` or ``"reinforce_to_go"`` (policy gradient), or ``"ipo"``
            (contrastive), see :func:`~lit_methods.llm.nash_prox_loss`; the same expected gradient.
        generation: how responses are drawn.
        loading: how the model is loaded and how much memory it may take.
        sampler: who draws responses; default: :class:`~lit_methods.llm.LocalSampler`.
        optimizer: builds the optimizer from the trained parameters.
        warmup_steps: optimizer steps over which the learning rate rises linearly, 0 or more.
        **old: arguments under the names of version 0.0, which warn.

    Raises:
        ValueError: for an argument outside its range, or a combination that cannot work.
        TypeError: for an unknown argument.
    """

    moved_arguments: ClassVar[dict[str, str]] = MOVED

    def __init__(
        self,
        model: str | dict[str, Any] | PreTrainedModel,
        judge: Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], Any],
        tokenizer: str | dict[str, Any] | PreTrainedTokenizerBase | None = None,
        reference: str | Reference | None = None,
        lora: dict[str, Any] | None = None,
        mode: Prox | MirrorProx | Literal["prox", "mirror_prox"] = "prox",
        beta: float = 0.1,
        eta: float = 0.25,
        samples_per_prompt: int = 4,
        loss_type: LossType = "reinforce",
        generation: Generation | None = None,
        loading: Loading | None = None,
        sampler: Sampler | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5),
        warmup_steps: int = 0,
        **old: Any,
    ) -> None:
        super().__init__()
        if isinstance(mode, str) and mode not in ("prox", "mirror_prox"):
            raise ValueError(f"mode must be 'prox', 'mirror_prox', a Prox or a MirrorProx, got {mode!r}")
        if isinstance(mode, str):
            mode = Prox() if mode == "prox" else MirrorProx()
        mirror = "inner_steps" in as_fields(mode)
        fields: dict[str, dict[str, Any]] = {
            "reference": {"model": reference} if isinstance(reference, str) else as_fields(reference),
            "mode": as_fields(mode),
            "generation": as_fields(generation),
            "loading": as_fields(loading),
        }
        if "kl_credit" in old:
            warnings.warn('NashMP: kl_credit="to_go" is now loss_type="reinforce_to_go"', FutureWarning)
            if old.pop("kl_credit") == "to_go" and loss_type == "reinforce":
                loss_type = "reinforce_to_go"
        moved = {**MOVED, "inner_steps": "mode.inner_steps" if mirror else "mode.copy_every"}
        if mirror and "opponent" in old:
            raise ValueError("opponent must be left out with mirror_prox, which chooses its own")
        move_arguments("NashMP", old, moved, fields)
        # From here on the settings are plain data, which is what a checkpoint keeps.
        reference, mode, generation, loading = fields.values()  # type: ignore[assignment]
        self.save_hyperparameters(ignore=live_arguments(locals()))
        self.reference = Reference(**fields["reference"])
        self.mode: Prox | MirrorProx = MirrorProx(**fields["mode"]) if mirror else Prox(**fields["mode"])
        self.generation = Generation(**fields["generation"])
        self.loading = Loading(**fields["loading"])
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be positive and finite, got {beta}")
        if not eta > 0:
            raise ValueError(f"eta must be positive, or inf for no target, got {eta}")
        if samples_per_prompt < 2:
            raise ValueError(f"samples_per_prompt must be >= 2, got {samples_per_prompt}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be >= 0, got {warmup_steps}")
        if loss_type not in LossType.__args__:  # type: ignore[attr-defined]
            raise ValueError(f"loss_type must be one of {LossType.__args__}, got {loss_type!r}")  # type: ignore[attr-defined]
        if mirror and math.isinf(eta):
            raise ValueError(f"eta must be finite with mirror_prox, got {eta}")
        if lora is None and self.loading.dtype != "float32":
            raise ValueError(
                f"dtype must be 'float32' in full fine-tuning, where other types round small updates away, got "
                f"{self.loading.dtype!r}; use it with trainer.precision: bf16-mixed, or set lora"
            )
        if lora is None and self.loading.load_in_4bit:
            raise ValueError("load_in_4bit needs lora: quantised weights cannot be trained")
        if lora is not None and lora.get("lora_dropout", 0.0):
            raise ValueError(
                f"lora_dropout must be 0, got {lora['lora_dropout']}: responses are drawn and scored by one policy"
            )
        if lora is not None and (lora.get("modules_to_save") or lora.get("bias", "none") != "none"):
            raise ValueError("lora must train adapters only: leave modules_to_save out and bias at 'none'")
        if lora is not None and self.reference.model is None and (self.reference.offload or self.reference.dtype):
            raise ValueError(
                "offload and dtype of the reference need weights of its own: under lora it is the base model without "
                "adapters; leave them out, or set the reference's model"
            )
        if loss_type != "ipo" and (self.generation.top_k or self.generation.top_p < 1):
            warnings.warn("top_k and top_p draw from another distribution than the one scored: biased gradients")
        if tokenizer is None and not isinstance(model, str):
            raise ValueError("tokenizer must be given when model is not a folder or hub id")
        self.judge = judge
        self.lora = lora
        self.beta = beta
        self.eta = eta
        self.samples_per_prompt = samples_per_prompt
        self.loss_type: LossType = loss_type
        self.sampler: Sampler = sampler or LocalSampler()
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.tokenizer = load_tokenizer(model if tokenizer is None else tokenizer)  # type: ignore[arg-type]
        self._model = model
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
        """Names of the players besides the policy and the reference."""
        names = [] if math.isinf(self.eta) else ["target"]
        return [*names, "opponent"] if isinstance(self.mode, MirrorProx) else names

    @property
    def adapter_base(self) -> str | None:
        """The folder or hub id whose weights the trained adapter belongs on; ``None`` if they are in no folder."""
        named = isinstance(self._model, str) and adapter_base(self._model) is None
        return str(self._model) if named and not self.base_changed else None

    def configure_model(self) -> None:
        """Load the model once and add adapters or frozen copies."""
        if self.policy is not None:
            return
        lm = load_causal_lm(self._model, self.loading)
        pad = self.tokenizer.pad_token_id
        self.generation = replace(
            self.generation,
            eos_token_ids=self.generation.eos_token_ids or end_token_ids(lm, self.tokenizer),
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
        )
        theirs = replace(self.loading, architecture=None, load_in_4bit=False)
        self.policy, self.frozen = build_players(lm, self.lora, self.frozen_players, self.reference, theirs, self._wrap)
        if self._device_mesh is not None:
            if self.reference.offload:
                raise ValueError("offload does not work with ModelParallelStrategy (FSDP2), which shards the reference")
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
        chunk_size = self.loading.logprob_chunk_size
        model = LanguageModel(lm, temperature=self.generation.temperature, chunk_size=chunk_size)
        if self.loading.torch_compile:
            for block in model.blocks():
                block.compile(dynamic=True)
        return model.train()  # as Lightning expects it; from_pretrained gives evaluation mode

    def player(self, name: str) -> AbstractContextManager[LanguageModel]:
        """The language model acting as ``"policy"``, ``"reference"``, ``"target"`` or ``"opponent"``.

        All but the policy are for use without gradients, and only inside the context.
        """
        assert self.policy is not None, "configure_model has not run"
        if name not in ("policy", "reference", *self.frozen_players):
            raise ValueError(f"there is no player {name!r} with mode={self.mode} and eta={self.eta}")
        away = name == "reference" and self.reference.offload
        return acting(name, self.policy, self.frozen, self.device if away else None)

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
        moved = ["reference"] if self.lora is None and self.reference.model is None else []
        for name in [*moved, *self.frozen_players]:
            self.move_player(name)

    # ---------------------------------------------------------------- one step

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """Sample, judge, score; returns the loss of the prox step."""
        times = StepTimes()
        prompts = self.encode(batch.prompts)
        generator = self._generator(self.batches_seen)
        self.batches_seen += 1
        players, grouped = self.opponents()
        drawn = self._draw([("policy", 1.0)], prompts, self.samples_per_prompt, generator)
        others = None if grouped else self._draw(players, prompts, self.samples_per_prompt, generator)
        times.generated = time.perf_counter()

        def ask() -> tuple[Tensor, int, float]:
            missing_eos_loses = self.generation.missing_eos_loses
            answers = ask_preferences(self.judge, batch.prompts, drawn, others, missing_eos_loses=missing_eos_loses)
            return *answers, time.perf_counter()

        judging = in_background(ask)
        with torch.no_grad():
            ref_logps = self.score("reference", prompts, drawn)[0]
            target_logps = None if math.isinf(self.eta) else self.score("target", prompts, drawn)[0]
        pref, num_pairs, times.judged = judging.result()
        logps, entropies = self.score("policy", prompts, drawn)
        groups = (len(batch.prompts), self.samples_per_prompt, -1)
        loss, metrics = nash_prox_loss(
            logps.view(groups),
            ref_logps.view(groups),
            None if target_logps is None else target_logps.view(groups),
            pref.to(logps),
            drawn.mask.view(groups),
            beta=self.beta,
            eta=self.eta,
            loss_type=self.loss_type,
            group_self_play=grouped,
        )
        self._scored = times.scored = time.perf_counter()

        logged: dict[str, Tensor | float] = {"loss": loss.detach()}
        if self._logging_now():
            if not grouped:
                metrics["win_rate/opponent"] = pref.mean().to(self.device)
            logged |= {
                **metrics,
                **response_metrics(drawn, entropies),
                "judge/pairs": float(num_pairs),
                **speed_metrics(times, drawn, others),
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
        drawn = self._draw([("policy", 1.0)], prompts, 1, self._generator(batch_idx, stream=1))
        with torch.no_grad():
            logps, entropies = self.score("policy", prompts, drawn)
            ref_logps, _ = self.score("reference", prompts, drawn)
        metrics = {"kl/ref": (logps - ref_logps).sum(1).mean(), **response_metrics(drawn, entropies)}
        self._log(stage, metrics, len(batch.prompts))
        return {
            "prompts": batch.prompts,
            "rows": batch.rows,
            "responses": drawn.texts,
            "lengths": drawn.mask.sum(1).tolist(),
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
        drawn = self._draw([(player, 1.0)], self.encode(prompts), 1, self._generator(seed, stream))
        return drawn.texts, drawn.mask.sum(1).tolist()

    def encode(self, prompts: list[Prompt]) -> EncodedPrompts:
        """Tokenise prompts onto the module's device."""
        return encode_prompts(self.tokenizer, prompts, max_length=self.generation.max_prompt_length, device=self.device)

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

    def opponents(self) -> tuple[list[tuple[str, float]], bool]:
        """Who is played, as (player, weight), and whether it is the policy's own group of samples."""
        if isinstance(self.mode, MirrorProx):
            return [("target" if self.phase == 0 else "opponent", 1.0)], False
        if self.mode.opponent == "mixture":
            return [("policy", 1.0 - self.mode.mixture), ("reference", self.mode.mixture)], False
        return [(self.mode.opponent, 1.0)], self.mode.opponent == "group"

    def _draw(
        self, players: list[tuple[str, float]], prompts: EncodedPrompts, num: int, generator: torch.Generator
    ) -> Drawn:
        def seat(name: str) -> Player:
            return lambda: self.player(name)

        with torch.no_grad(), self._with_caches():
            seats = [(seat(name), weight) for name, weight in players]
            tokens = self.sampler(seats, prompts, num, self.generation, generator)
        mask = response_mask(tokens, self.generation.eos_token_ids)
        ends = torch.tensor(self.generation.eos_token_ids, device=tokens.device)
        return Drawn(tokens, mask, self.decode(tokens, mask), (torch.isin(tokens, ends) & mask).any(1))

    def score(self, name: str, prompts: EncodedPrompts, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Log-probabilities of drawn tokens under a player, and its entropies at them, ``(rows, tokens)`` each."""
        with self.player(name) as model:
            return model.score(prompts, drawn.tokens, drawn.mask, micro_batch_size=self.loading.micro_batch_size)

    @contextmanager
    def _with_caches(self) -> Iterator[None]:
        """Evaluation mode, where gradient checkpointing allows caches. Nothing else depends on it: dropout is off."""
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

    def _generator(self, count: int, stream: int = 0) -> torch.Generator:
        """Random numbers as a function of (seed, rank, stream, count), so that nothing needs to be checkpointed."""
        seed = hash((self.generation.seed, self.global_rank, stream, count)) % 2**63
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
        for name, value in metrics.items():
            shown = stage == "train" and name in ("kl/ref", "tokens_per_s/generated")
            several = self.trainer.world_size > 1
            self.log(f"{stage}/{name}", value, prog_bar=shown, batch_size=batch_size, sync_dist=several)

    # ---------------------------------------------------------------- optimisation

    def configure_optimizers(self) -> Any:
        """The injected optimizer over the policy's weights, with a linear warm-up."""
        optimizer = self.optimizer(self.player_parameters("policy"))
        if not self.warmup_steps:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Refuse trained weights in a type that would round their updates away, and averages that average nothing."""
        refuse_swa(self.trainer)
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
        if isinstance(self.mode, MirrorProx):
            if self.inner_step % self.mode.inner_steps == 0:
                self.move_player("opponent" if self.phase == 0 else "target")
                self.phase = 1 - self.phase
        elif not math.isinf(self.eta):
            if self.mode.copy_every is None:
                self.move_player("target", self.mode.kappa)
            elif self.inner_step % self.mode.copy_every == 0:
                self.move_player("target")

    def on_train_batch_end(self, outputs: Any, batch: PromptBatch, batch_idx: int) -> None:
        """Keep weight averaging callbacks from averaging what is frozen."""
        restore_frozen(self.trainer, self)

    def on_train_epoch_end(self) -> None:
        """The same after their update at an epoch's end."""
        restore_frozen(self.trainer, self)

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters; leave out weights that can be loaded again, and keep their hash."""
        checkpoint["nash_mp"] = {
            "phase": self.phase,
            "inner_step": self.inner_step,
            "batches_seen": self.batches_seen,
            "base_changed": self.base_changed,
        }
        restore_frozen_in(checkpoint, self)
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
