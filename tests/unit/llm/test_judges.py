import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from lit_methods.llm import (
    EnsembleJudge,
    FunctionJudge,
    HTTPJudge,
    PairwiseJudge,
    PairwiseModelJudge,
    RewardModelJudge,
    ScoreJudge,
)
from lit_methods.llm.judges import query_judge
from lit_methods.llm.language_model import word_tokenizer
from lit_methods.llm.loading import build_config, load_causal_lm
from lit_methods.llm.word_game import word_game_preference
from tests.unit.llm.tiny import LLAMA, WORDS

PROMPTS = ["w0", "w1 w2", "w0"]
A, B = ["w3 w4", "w5", "w6 w7 w8"], ["w9", "w5 w5", "w1"]


def test_equal_texts_tie_and_never_reach_the_judge() -> None:
    asked: list[Any] = []

    def judge(prompts: Any, a: Any, b: Any) -> list[float]:
        asked.extend(zip(prompts, a, b, strict=True))
        return [0.9] * len(a)

    result = query_judge(judge, ["p", "q", "r"], ["x", "y", "z"], ["x", "w", "z"])
    torch.testing.assert_close(result, torch.tensor([0.5, 0.9, 0.5]))
    assert asked == [("q", "y", "w")]
    assert query_judge(judge, [], [], []).shape == (0,)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([0.5], "one value per pair"),
        ([[0.5, 0.5]], "one value per pair"),
        ([0.5, float("nan")], "returned nan"),
        ([0.5, 1.5], r"returned 1.5 for 'b' against 'd'"),
        ([-0.1, 0.5], r"\[0, 1\]"),
        (None, r"<lambda> returned None for 2 pairs; return one probability per pair"),
        ([0.5, None], r"<lambda> returned \[0.5, None\] for 2 pairs"),
        ("no", "return one probability per pair"),
    ],
)
def test_wrong_answers_are_refused(answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        query_judge(lambda prompts, a, b: answer, ["p", "q"], ["a", "b"], ["c", "d"])


def test_function_score_and_ensemble() -> None:
    function: PairwiseJudge = FunctionJudge(lambda prompt, a, b: 1.0 if len(a) > len(b) else 0.0)
    assert function(PROMPTS, A, B).tolist() == [1.0, 0.0, 1.0]
    score = ScoreJudge(lambda prompt, text: len(text) / 10, scale=2.0)
    torch.testing.assert_close(score(PROMPTS, A, B), torch.sigmoid(torch.tensor([0.6, -0.6, 1.2])))
    both = EnsembleJudge([function, score], weights=[1.0, 3.0])
    torch.testing.assert_close(both(PROMPTS, A, B), 0.25 * function(PROMPTS, A, B) + 0.75 * score(PROMPTS, A, B))
    with pytest.raises(ValueError, match="positive"):
        EnsembleJudge([function], weights=[0.0])
    with pytest.raises(ValueError, match="as many"):
        EnsembleJudge([])
    with pytest.raises(ValueError, match="scale"):
        ScoreJudge(lambda prompt, text: 0.0, scale=0.0)


def silent(prompt: Any, a: str, b: str = "") -> None:
    """A judge that forgot its return."""


def failing(prompt: Any, a: str, b: str = "") -> float:
    raise KeyError("my mistake")


@pytest.mark.parametrize("kind", [FunctionJudge, ScoreJudge])
def test_errors_name_the_function_and_the_pair(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"returned by silent for 'w3'.*, got None"):
        query_judge(kind(silent), ["p"], ["w3"], ["w9"])
    with pytest.raises(KeyError) as caught:
        query_judge(kind(failing), ["p"], ["w3"], ["w9"])
    notes = "\n".join(caught.value.__notes__)
    assert "raised by failing for 'w3'" in notes
    assert f"raised by {kind.__name__}, asked about 1 pairs, first 'w3' against 'w9'" in notes


def test_word_game_is_antisymmetric_and_cycles() -> None:
    pure = {letter: " ".join([f"{letter}0"] * 5) for letter in "abcx"}
    for winner, loser in ("ab", "bc", "ca", "ax", "bx", "cx"):
        assert word_game_preference("", pure[winner], pure[loser]) > 0.94
    for first in (*pure.values(), "a0 b0 x1", ""):
        for second in (*pure.values(), "c0 c1 a2", ""):
            total = word_game_preference("", first, second) + word_game_preference("", second, first)
            assert total == pytest.approx(1.0, abs=1e-12)


def classifier(num_labels: int) -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(build_config({**LLAMA, "num_labels": num_labels}))


def test_reward_model_judge_scores_texts_alone_or_in_batches(tmp_path: Path) -> None:
    model, tokenizer = classifier(1), word_tokenizer(WORDS)
    judge = RewardModelJudge(model, tokenizer, batch_size=2, temperature=0.5)
    prompts = [f"{prompt} " for prompt in PROMPTS]

    def reward(text: str) -> float:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            return model(input_ids=ids).logits.item()

    expected = [reward(p + a) - reward(p + b) for p, a, b in zip(prompts, A, B, strict=True)]
    torch.testing.assert_close(judge(prompts, A, B), torch.sigmoid(torch.tensor(expected) / 0.5), atol=1e-5, rtol=0)
    torch.testing.assert_close(judge(prompts, A, B) + judge(prompts, B, A), torch.ones(3))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.testing.assert_close(RewardModelJudge(str(tmp_path), temperature=0.5)(prompts, A, B), judge(prompts, A, B))
    with pytest.raises(ValueError, match="one output"):
        RewardModelJudge(classifier(2), tokenizer)
    with pytest.raises(ValueError, match="tokenizer"):
        RewardModelJudge(model)


@pytest.mark.parametrize("pad", [5, 0, 1, None])
@pytest.mark.parametrize("ending", ["", " <eos>", " <pad>"])
def test_reward_is_read_at_the_last_token_whatever_pads(pad: int | None, ending: str) -> None:
    model, tokenizer = classifier(1), word_tokenizer(WORDS)
    model.config.pad_token_id = pad
    if pad == 1:
        tokenizer.pad_token = tokenizer.eos_token

    def reward(text: str) -> Tensor:
        with torch.no_grad():
            hidden = model.model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state
            return model.score(hidden)[0, -1, 0]

    a, b = f" w1{ending}", f" w2 w3{ending}"
    expected = torch.sigmoid(reward("w0" + a) - reward("w0" + b))
    judge = RewardModelJudge(model, tokenizer)
    torch.testing.assert_close(judge(["w0"], [a], [b])[0], expected, atol=1e-6, rtol=0)
    among_longer = judge(["w0", "w0"], [a, " w1" * 9], [b, " w4"])[0]
    torch.testing.assert_close(among_longer, expected, atol=1e-6, rtol=0)
    assert model.config.pad_token_id == pad  # the user's model is left as it was


def test_adapters_of_judges_are_merged(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    lora: dict[str, Any] = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
    tokenizer = word_tokenizer([*WORDS[:16], "A", "B"])
    for kind, task in (("causal", "CAUSAL_LM"), ("reward", "SEQ_CLS")):
        load_causal_lm(LLAMA).save_pretrained(tmp_path / "base")
        model: Any = load_causal_lm(str(tmp_path / "base"))
        if task == "SEQ_CLS":
            model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
        tuned = get_peft_model(model, LoraConfig(task_type=task, **lora))
        tuned.save_pretrained(str(tmp_path / kind))
        plain = copy.deepcopy(tuned).merge_and_unload()
        path = str(tmp_path / kind)
        if kind == "reward":
            found, expected = RewardModelJudge(path, tokenizer), RewardModelJudge(plain, tokenizer)
        else:
            found, expected = PairwiseModelJudge(path, tokenizer), PairwiseModelJudge(plain, tokenizer)
        prompts = [f"{prompt} " for prompt in PROMPTS]
        torch.testing.assert_close(found(prompts, A, B), expected(prompts, A, B), atol=1e-5, rtol=0)


def test_encoders_are_read_at_their_first_token() -> None:
    bert = {"model_type": "bert", "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        build_config({**bert, "intermediate_size": 32, "num_labels": 1, "pad_token_id": 0})
    ).eval()
    tokenizer = word_tokenizer(WORDS)

    def reward(text: str) -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 0]

    found = RewardModelJudge(model, tokenizer)(["w0", "w0"], [" w1", " w1 w1 w1"], [" w2 w3", " w4"])
    expected = torch.sigmoid(reward("w0 w1") - reward("w0 w2 w3"))
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ('{prompt} {a} {b} {"best": "A"}', r"no fields but .*; write braces that are no field twice"),
        ("{prompt} {a} {b} {question}", r"got \['question'\]"),
        ("{prompt} {a} {b} {", "write braces that are no field twice"),
        ("{prompt} {a:>9} {b}", "template must contain {a}"),
        ("{prompt} {a!r} {b}", "template must contain {a}"),
    ],
)
def test_templates_are_checked_at_construction(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairwiseModelJudge(load_causal_lm(LLAMA), word_tokenizer(WORDS), template=template, answers=("w0", "w1"))


def test_templates_may_write_braces_twice() -> None:
    template = 'w2 {prompt} {a} {b} {{"best": "A"}}'
    judge = PairwiseModelJudge(load_causal_lm(LLAMA), word_tokenizer(WORDS), template=template, answers=("w0", "w1"))
    assert judge.question("p", "{x}", "y") == 'w2 p {x} y {"best": "A"}'


@pytest.mark.parametrize("kind", ["causal", 1, 2])
def test_pairwise_model_judge_has_no_position_bias(kind: Any) -> None:
    torch.manual_seed(0)
    tokenizer = word_tokenizer([*WORDS[:16], "A", "B"])
    model = load_causal_lm({**LLAMA, "initializer_range": 0.5}) if kind == "causal" else classifier(kind)
    judge = PairwiseModelJudge(model, tokenizer, template="{prompt} w0 {a} w1 {b} w2", batch_size=2)
    forward, backward = judge(PROMPTS, A, B), judge(PROMPTS, B, A)
    torch.testing.assert_close(forward + backward, torch.ones(3))
    assert (forward - 0.5).abs().max() > 1e-4
    question = f"{PROMPTS[0]} w0 {A[0]} w1 {B[0]} w2"
    swapped = f"{PROMPTS[0]} w0 {B[0]} w1 {A[0]} w2"
    wins = []
    for text in (question, swapped):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits
        if kind == "causal":
            first, second = logits[0, -1, tokenizer.convert_tokens_to_ids(["A", "B"])]
            wins.append(torch.sigmoid(first - second))
        else:
            wins.append(torch.sigmoid(logits[0, 0] - (logits[0, 1] if kind == 2 else 0)))
    torch.testing.assert_close(forward[0], (wins[0] + 1 - wins[1]) / 2, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"\{b\}"):
        PairwiseModelJudge(model, tokenizer, template="{prompt} {a}")
    if kind == "causal":
        with pytest.raises(ValueError, match="two different"):
            PairwiseModelJudge(model, tokenizer, answers=("A", "A"))


def answer_headers(status: int, answer: bytes) -> list[tuple[str, str]]:
    """A redirect's answer is its target; an answer that ends in ``...`` promises more than it holds."""
    if 300 <= status < 400:
        return [("Location", answer.decode())]
    return [("Content-Length", str(len(answer) + 9))] if answer.endswith(b"...") else []


Reply = Callable[[dict[str, Any], int], tuple[int, bytes]]


@contextmanager
def server(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A real HTTP server; ``reply`` maps the request and its number to status and body."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({**body, "headers": dict(self.headers)})
            status, answer = reply(body, len(requests))
            if status <= 0:  # hang up, or speak no HTTP
                if status < 0:
                    self.wfile.write(answer)
                self.connection.close()
                return
            self.send_response(status)
            for name, value in answer_headers(status, answer):
                self.send_header(name, value)
            self.end_headers()
            with suppress(BrokenPipeError):
                self.wfile.write(answer)

        def do_GET(self) -> None:
            requests.append({"method": "GET", "headers": dict(self.headers)})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"preferences": [1.0]}')

        def log_message(self, *arguments: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/judge", requests
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def prefer_longer(body: dict[str, Any], number: int) -> tuple[int, bytes]:
    values = [0.75 if len(a) > len(b) else 0.25 for a, b in zip(body["a"], body["b"], strict=True)]
    return 200, json.dumps({"preferences": values}).encode()


def test_http_judge_batches_caches_and_sends_headers() -> None:
    with server(prefer_longer) as (url, requests):
        judge = HTTPJudge(url, headers={"Authorization": "Bearer x"}, batch_size=2, concurrency=1)
        assert query_judge(judge, PROMPTS, A, B).tolist() == [0.75, 0.25, 0.75]
        assert [len(request["a"]) for request in requests] == [2, 1]
        assert requests[0]["headers"]["Authorization"] == "Bearer x"
        assert query_judge(judge, PROMPTS, A, B).tolist() == [0.75, 0.25, 0.75]
        assert len(requests) == 2  # remembered
        chat = [[{"role": "user", "content": "w0"}]]
        assert judge(chat, ["longer"], ["short"]).tolist() == [0.75]
        assert requests[-1]["prompts"] == chat
        small = HTTPJudge(url, cache_size=1)
        assert small(PROMPTS, A, B).tolist() == [0.75, 0.25, 0.75]
        asked = len(requests)
        assert small(PROMPTS[-1:], A[-1:], B[-1:]).tolist() == [0.75]
        assert len(requests) == asked
        assert small(PROMPTS[:1], A[:1], B[:1]).tolist() == [0.75]
        assert len(requests) == asked + 1  # forgotten


def test_http_judge_asks_several_at_a_time_and_keeps_their_order() -> None:
    together = threading.Barrier(3)

    def reply(body: dict[str, Any], number: int) -> tuple[int, bytes]:
        together.wait(timeout=60)  # breaks if requests come one by one
        return prefer_longer(body, number)

    with server(reply) as (url, _):
        judge = HTTPJudge(url, batch_size=1, concurrency=3, retries=0)
        assert query_judge(judge, PROMPTS, A, B).tolist() == [0.75, 0.25, 0.75]


@pytest.mark.parametrize(
    "fault",
    [
        (500, b""),
        (429, b""),
        (200, b"<html>"),
        (200, b"\xff\xfe"),
        (200, b'{"prefer...'),  # ends before its Content-Length
        (0, b""),
        (-1, b"no HTTP at all\r\n\r\n"),
    ],
)
def test_http_judge_tries_again_after_passing_faults(fault: tuple[int, bytes]) -> None:
    def reply(body: dict[str, Any], number: int) -> tuple[int, bytes]:
        return fault if number <= 2 else prefer_longer(body, number)

    with server(reply) as (url, requests):
        assert HTTPJudge(url, retries=2, backoff=0.01)(["p"], ["aaa"], ["b"]).tolist() == [0.75]
        assert len(requests) == 3
    with server(lambda body, number: fault) as (url, requests):
        with pytest.raises(RuntimeError, match=r"failed 2 times; last: "):
            HTTPJudge(url, retries=1, backoff=0.01)(["p"], ["aaa"], ["b"])
        assert len(requests) == 2


def test_http_judge_gives_up_on_slow_and_absent_servers() -> None:
    def slow(body: dict[str, Any], number: int) -> tuple[int, bytes]:
        time.sleep(1.0)
        return prefer_longer(body, number)

    with server(slow) as (url, _), pytest.raises(RuntimeError, match="time"):
        HTTPJudge(url, timeout=0.1, retries=0)(["p"], ["aaa"], ["b"])
    with pytest.raises(RuntimeError, match=r"127\.0\.0\.1.*refused"):
        HTTPJudge(url, retries=1, backoff=0.01)(["p"], ["aaa"], ["b"])


def test_http_judge_bounds_a_whole_attempt_and_not_each_read() -> None:
    stop = threading.Event()

    class Dripping(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                while not stop.wait(0.02):
                    self.wfile.write(b" ")

        def log_message(self, *arguments: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        with pytest.raises(RuntimeError, match=r"failed 1 times; last: .*timeout"):
            HTTPJudge(f"http://127.0.0.1:{http.server_port}", timeout=0.5, retries=0)(["p"], ["aaa"], ["b"])
    finally:
        stop.set()
        http.shutdown()
        http.server_close()


def test_http_judge_does_not_repeat_refused_requests_and_shows_why() -> None:
    with server(lambda body, number: (401, b"no such key" + b"." * 999)) as (url, requests):
        with pytest.raises(RuntimeError, match=r"refused the request: HTTP 401.*: no such key\.+$") as caught:
            HTTPJudge(url)(["p"], ["aaa"], ["b"])
        assert len(requests) == 1
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_http_judge_follows_redirects_as_post_and_never_to_another_host(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    with server(prefer_longer) as (elsewhere, others), server(lambda *_: (status, elsewhere.encode())) as (url, _):
        with pytest.raises(RuntimeError, match=r"refused the request: .*redirect to http.*, which is not followed"):
            HTTPJudge(url, token_env="MY_TOKEN")(["p"], ["aaa"], ["b"])
        assert others == []

    def moved(body: dict[str, Any], number: int) -> tuple[int, bytes]:
        return (status, b"/judge/") if number == 1 else prefer_longer(body, number)

    with server(moved) as (url, requests):
        if status == 303:  # means: ask again with GET
            with pytest.raises(RuntimeError, match="not followed"):
                HTTPJudge(url)(["p"], ["aaa"], ["b"])
            assert len(requests) == 1
        else:
            assert HTTPJudge(url, token_env="MY_TOKEN")(["p"], ["aaa"], ["b"]).tolist() == [0.75]
            assert [request["headers"]["Authorization"] for request in requests] == ["Bearer s3cret"] * 2
            assert requests[1]["a"] == ["aaa"]


def test_http_judge_takes_secrets_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "k3y")
    monkeypatch.setenv("MY_TOKEN", "t0ken")
    with server(prefer_longer) as (url, requests):
        judge = HTTPJudge(url, headers_from_env={"X-Api-Key": "MY_KEY"}, token_env="MY_TOKEN")
        judge(["p"], ["aaa"], ["b"])
        assert requests[0]["headers"]["X-Api-Key"] == "k3y"
        assert requests[0]["headers"]["Authorization"] == "Bearer t0ken"
        assert "k3y" not in repr(vars(judge))
        assert "t0ken" not in repr(vars(judge))
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ValueError, match="environment variable MY_KEY must be set"):
        HTTPJudge(url, headers_from_env={"X-Api-Key": "MY_KEY"})
    with pytest.raises(ValueError, match=r"no masked secret, got \['Authorization'\]"):
        HTTPJudge(url, headers={"Authorization": "***"})
    with pytest.raises(RuntimeError) as caught:
        HTTPJudge("http://me:pass@127.0.0.1:9/?api_key=k3y", retries=0)(["p"], ["aaa"], ["b"])
    assert "k3y" not in str(caught.value)
    assert "pass@" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"preferences": [0.5, 0.5]}, "1 numbers"),
        ({"scores": [0.5]}, "1 numbers"),
        ([0.5], "1 numbers"),
        ({"preferences": [None]}, "returned nan"),
        ({"preferences": ["A"]}, "must answer with numbers"),
        ({"preferences": [1.5]}, "returned 1.5"),
    ],
)
def test_http_judge_answers_are_checked_and_bad_ones_not_remembered(answer: Any, message: str) -> None:
    with server(lambda body, number: (200, json.dumps(answer).encode())) as (url, requests):
        judge = HTTPJudge(url)
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                query_judge(judge, ["p"], ["aaa"], ["b"])
        assert len(requests) == 2


def test_http_judge_bad_arguments() -> None:
    with pytest.raises(ValueError, match="url must start"):
        HTTPJudge("localhost:80")
    with pytest.raises(ValueError, match="timeout"):
        HTTPJudge("http://x", timeout=0)
    with pytest.raises(ValueError, match="batch_size"):
        HTTPJudge("http://x", batch_size=0)
