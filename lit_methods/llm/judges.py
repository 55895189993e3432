"""Judges: who says how probable it is that one response is preferred to another.

A judge is any callable with the signature of :class:`PairwiseJudge`. Preferences need not come from scores: judges may
be intransitive. :func:`query_judge` is how trainers call one; it settles ties of equal texts and checks the answer.
"""

import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from string import Formatter
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_methods.batches import Prompt
from lit_methods.llm.language_model import PreTrainedModel, load_any_tokenizer, render_prompt
from lit_methods.llm.loading import adapter_base, from_pretrained
from lit_methods.llm.logprobs import position_ids


class PairwiseJudge(Protocol):
    """Compares pairs of responses."""

    def __call__(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> Tensor | Sequence[float]:
        """Probability that ``a[i]`` is preferred to ``b[i]`` as a response to ``prompts[i]``, in ``[0, 1]``."""
        ...


def query_judge(
    judge: Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], Any],
    prompts: Sequence[Prompt],
    a: Sequence[str],
    b: Sequence[str],
) -> Tensor:
    """Ask a judge, and trust nothing about its answer.

    Equal texts are a tie, ``0.5`` exactly, and never reach the judge.

    Args:
        judge: a :class:`PairwiseJudge`.
        prompts: one prompt per pair.
        a: first responses.
        b: second responses.

    Returns:
        probabilities that ``a`` is preferred, ``(pairs,)``, float32, on the CPU.

    Raises:
        ValueError: if the judge returns nothing, another number of values, NaN, or values outside ``[0, 1]``. What the
            judge itself raises gets a note that names it.
    """
    preference = torch.full((len(a),), 0.5)
    asked = [index for index, (first, second) in enumerate(zip(a, b, strict=True)) if first != second]
    if not asked:
        return preference
    name = judge_name(judge)
    try:
        answer = judge([prompts[i] for i in asked], [a[i] for i in asked], [b[i] for i in asked])
    except Exception as error:
        error.add_note(
            f"raised by {name}, asked about {len(asked)} pairs, first {a[asked[0]]!r} against {b[asked[0]]!r}"
        )
        raise
    try:
        answer = torch.as_tensor(answer, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} returned {answer!r:.200} for {len(asked)} pairs; return one probability per pair"
        ) from error
    if answer.shape != (len(asked),):
        raise ValueError(
            f"{name} returned shape {tuple(answer.shape)} for {len(asked)} pairs; return one value per pair"
        )
    wrong = ~((answer >= 0) & (answer <= 1))
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name} returned {answer[index].item()} for {a[asked[index]]!r} against {b[asked[index]]!r}; "
            "it must return probabilities in [0, 1]"
        )
    preference[asked] = answer
    return preference


def judge_name(judge: object) -> str:
    """What a user calls a judge: the name of a function, or of the class of anything else."""
    return getattr(judge, "__qualname__", None) or type(judge).__qualname__


def _numbers(function: Callable[..., Any], questions: Iterable[tuple[Any, ...]]) -> Tensor:
    """What a user's function says about each question, ``(questions,)``.

    Raises:
        ValueError: for an answer that is no number; names the function and the texts.
    """
    values = []
    for prompt, *texts in questions:
        about = f"{judge_name(function)} for {' against '.join(map(repr, texts))}"
        try:
            value = function(prompt, *texts)
        except Exception as error:
            error.add_note(f"raised by {about}")
            raise
        try:
            values.append(float(value))
        except (TypeError, ValueError) as error:
            raise ValueError(f"a number must be returned by {about}, got {value!r:.200}") from error
    return torch.tensor(values)


class FunctionJudge:
    """A judge from a function of one pair.

    Args:
        function: maps (prompt, first response, second response) to the probability that the first is preferred.
    """

    def __init__(self, function: Callable[[Prompt, str, str], float]) -> None:
        self.function = function

    def __call__(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> Tensor:
        """See :class:`PairwiseJudge`."""
        return _numbers(self.function, zip(prompts, a, b, strict=True))


class ScoreJudge:
    """A judge from a score of one response: ``sigmoid(scale * (score(a) - score(b)))``. Transitive by construction.

    Args:
        score: maps (prompt, response) to a number; larger is better.
        scale: how sharply a difference of scores decides, positive.
    """

    def __init__(self, score: Callable[[Prompt, str], float], scale: float = 1.0) -> None:
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be > 0 and finite, got {scale}")
        self.score = score
        self.scale = scale

    def __call__(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> Tensor:
        """See :class:`PairwiseJudge`."""
        first, second = (_numbers(self.score, zip(prompts, texts, strict=True)) for texts in (a, b))
        return torch.sigmoid(self.scale * (first - second))


class RewardModelJudge:
    """Bradley-Terry preferences of a reward model: ``sigmoid((r_a - r_b) / temperature)``.

    Every (prompt, response) is scored once per call, however many pairs it is in; decoders are read at the last token.

    Args:
        model: folder or hub id of a sequence classifier with one output, or of an adapter of one, or the model.
        tokenizer: its tokenizer; default: that of ``model``.
        temperature: divides the difference of rewards, positive.
        batch_size: responses per forward pass.
        max_length: longer texts lose their beginning; ``None`` for no limit.
        device: where the model runs; default: the GPU of this process, if there is one.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: Any = None,
        temperature: float = 1.0,
        batch_size: int = 16,
        max_length: int | None = 2048,
        device: str | None = None,
    ) -> None:
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
        self.model, self.tokenizer = _load_judge(model, tokenizer, device)
        if self.model.config.num_labels != 1:
            raise ValueError(
                f"a reward model has one output, got {self.model.config.num_labels}: see PairwiseModelJudge"
            )
        self.temperature = temperature
        self.batch_size = batch_size
        self.max_length = max_length

    def __call__(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> Tensor:
        """See :class:`PairwiseJudge`."""
        texts = [
            _conversation(self.tokenizer, prompt, response)
            for responses in (a, b)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        unique = list(dict.fromkeys(texts))
        rewards = dict(zip(unique, self._rewards(unique), strict=True))
        first, second = torch.tensor([rewards[text] for text in texts]).chunk(2)
        return torch.sigmoid((first - second) / self.temperature)

    def _rewards(self, texts: list[str]) -> list[float]:
        logits = _forward(
            self.model, self.tokenizer, texts, self.batch_size, self.max_length, lambda output: output.logits
        )
        return logits.squeeze(1).tolist()


PAIR_TEMPLATE = (
    "Which response to the request is better?\n\nRequest:\n{prompt}\n\nResponse A:\n{a}\n\nResponse B:\n{b}\n\n"
    "Answer with A or B only."
)


class PairwiseModelJudge:
    """A model that sees both responses at once; asked in both orders, so that position does not matter.

    A causal language model answers with one of two words, whose next-token probabilities are compared; a sequence
    classifier has one output (logit of "the first is better") or two (first, second). The result is
    ``(P(a, b) + 1 - P(b, a)) / 2``, which makes ``P(a, b) + P(b, a) = 1`` exact.

    Args:
        model: folder or hub id of a model or adapter, or the model; a classifier if its configuration says
            ``ForSequenceClassification``.
        tokenizer: its tokenizer; default: that of ``model``.
        template: text with the fields ``{prompt}``, ``{a}`` and ``{b}``, where other braces are written twice (``{{``
            and ``}}``); goes through the chat template, if any.
        answers: the two words a causal model chooses from: first better, second better.
        batch_size: texts per forward pass.
        max_length: longer texts lose their beginning; ``None`` for no limit.
        device: where the model runs; default: the GPU of this process, if there is one.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: Any = None,
        template: str = PAIR_TEMPLATE,
        answers: tuple[str, str] = ("A", "B"),
        batch_size: int = 16,
        max_length: int | None = 4096,
        device: str | None = None,
    ) -> None:
        _check_template(template)
        self.model, self.tokenizer = _load_judge(model, tokenizer, device)
        self.classifier = "ForSequenceClassification" in type(self.model).__name__
        self.template = template
        self.batch_size = batch_size
        self.max_length = max_length
        if not self.classifier:
            ids = [self.tokenizer(answer, add_special_tokens=False)["input_ids"][:1] for answer in answers]
            if ids[0] == ids[1] or not ids[0] or not ids[1]:
                raise ValueError(f"answers must begin with two different tokens, got {answers!r}")
            self.answer_ids = [ids[0][0], ids[1][0]]

    def __call__(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> Tensor:
        """See :class:`PairwiseJudge`."""
        texts = [
            self.question(prompt, first, second)
            for one, other in ((a, b), (b, a))
            for prompt, first, second in zip(prompts, one, other, strict=True)
        ]
        logits = _forward(self.model, self.tokenizer, texts, self.batch_size, self.max_length, self._answer_logits)
        wins = torch.sigmoid(logits[:, 0] if logits.shape[1] == 1 else logits[:, 0] - logits[:, 1])
        forward, backward = wins.chunk(2)
        return (forward + 1.0 - backward) / 2

    def question(self, prompt: Prompt, a: str, b: str) -> str:
        """What the model is asked about two responses, chat template included."""
        text = prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
        question = self.template.format(prompt=text, a=a, b=b)
        if self.classifier or not self.tokenizer.chat_template:
            return question
        return render_prompt(self.tokenizer, [{"role": "user", "content": question}])

    def _answer_logits(self, output: Any) -> Tensor:
        return output.logits if self.classifier else output.logits[:, -1, self.answer_ids]


class EnsembleJudge:
    """The weighted mean of several judges.

    Args:
        judges: the judges, at least one.
        weights: one positive weight each; equal when left out.
    """

    def __init__(self, judges: list[Any], weights: list[float] | None = None) -> None:
        weights = [1.0] * len(judges) if weights is None else weights
        if not judges or len(weights) != len(judges) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(
                f"judges and weights must be as many, positive and finite, got {len(judges)} and {weights}"
            )
        self.judges = judges
        self.weights = [weight / math.fsum(weights) for weight in weights]

    def __call__(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> Tensor:
        """See :class:`PairwiseJudge`."""
        opinions = [
            weight * query_judge(judge, prompts, a, b) for judge, weight in zip(self.judges, self.weights, strict=True)
        ]
        return torch.stack(opinions).sum(0).clamp(0.0, 1.0)


def _check_template(template: str) -> None:
    cure = "write braces that are no field twice, as {{ and }}"
    try:
        fields = {part[1:] for part in Formatter().parse(template) if part[1] is not None}
    except ValueError as error:
        raise ValueError(f"template must have the fields {{prompt}}, {{a}} and {{b}}: {error}; {cure}") from error
    plain = {(name, "", None) for name in ("prompt", "a", "b")}
    if missing := sorted(plain - fields):
        raise ValueError(f"template must contain {{{missing[0][0]}}}, got {template!r}")
    if unknown := sorted(str(name) for name, *_ in fields - plain):
        raise ValueError(f"template must have no fields but {{prompt}}, {{a}} and {{b}}, got {unknown}; {cure}")


def _load_judge(model: str | PreTrainedModel, tokenizer: Any, device: str | None) -> tuple[PreTrainedModel, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    if tokenizer is None:
        if not isinstance(model, str):
            raise ValueError("tokenizer must be given along with a model object")
        tokenizer = model
    if isinstance(model, str):
        base = adapter_base(model)
        names = AutoConfig.from_pretrained(base or model).architectures or []
        classifier = any("ForSequenceClassification" in name for name in names)
        if base is not None:
            from peft import PeftConfig

            classifier |= PeftConfig.from_pretrained(model).task_type == "SEQ_CLS"
        model = from_pretrained(AutoModelForSequenceClassification if classifier else AutoModelForCausalLM, model)
    device = device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    if isinstance(tokenizer, str):
        tokenizer = load_any_tokenizer(tokenizer)
    return model.to(device).eval().requires_grad_(False), tokenizer  # type: ignore[union-attr, arg-type]


def _conversation(tokenizer: Any, prompt: Prompt, response: str) -> str:
    if isinstance(prompt, str):
        return prompt + response
    if not tokenizer.chat_template:
        return "\n".join([*(turn["content"] for turn in prompt), response])
    return tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": response}], tokenize=False)


@torch.no_grad()
def _forward(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: list[str],
    batch_size: int,
    max_length: int | None,
    pick: Callable[[Any], Tensor],
) -> Tensor:
    """Run texts through a model, shortest first; rows in the order of ``texts``, on the CPU."""
    templated = bool(tokenizer.chat_template)
    rows = [tokenizer(text, add_special_tokens=not templated)["input_ids"] for text in texts]
    rows = [row if max_length is None else row[-max_length:] for row in rows]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    accepted = inspect.signature(model.forward).parameters
    # Encoders read a fixed position and want their padding on the right. Decoders read the last one: padded on the
    # left, it is the last real token, whichever token pads.
    encoder = "ForSequenceClassification" in type(model).__name__ and "past_key_values" not in accepted
    outputs: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        length = max(len(rows[index]) for index in chosen)
        ids = torch.full((len(chosen), length), pad)
        mask = torch.zeros_like(ids)
        for line, index in enumerate(chosen):
            place = slice(0, len(rows[index])) if encoder else slice(length - len(rows[index]), length)
            ids[line, place] = torch.tensor(rows[index])
            mask[line, place] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        options = {} if encoder else {"position_ids": position_ids(mask), "logits_to_keep": 1}
        with _reading_the_last_position(model, encoder):
            output = model(
                input_ids=ids,
                attention_mask=mask,
                **{name: value for name, value in options.items() if name in accepted},
            )
        outputs.update(zip(chosen, pick(output).float().cpu(), strict=True))
    return torch.stack([outputs[index] for index in range(len(rows))])


@contextmanager
def _reading_the_last_position(model: PreTrainedModel, encoder: bool) -> Iterator[None]:
    """Keep a decoder's classifier from looking for padding, for which it takes every token of that id."""
    config = model.config.get_text_config()
    own = config.pad_token_id
    config.pad_token_id = own if encoder else -1
    try:
        yield
    finally:
        config.pad_token_id = own
