"""A judge behind a URL."""

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain
from typing import Any
from urllib.parse import urljoin, urlsplit

import torch
from torch import Tensor

from lit_methods.batches import Prompt
from lit_methods.llm.background import in_background, map_in_background
from lit_methods.masking import MASK, mask_secrets


class HTTPJudge:
    """A judge behind a URL.

    Sends ``POST`` requests with ``{"prompts": [...], "a": [...], "b": [...]}`` as JSON and expects
    ``{"preferences": [...]}``, one probability per pair. Whatever fails on the way, answers that take too long or are
    no JSON, and the statuses 408, 429 and 5xx are tried again with growing pauses; other statuses are errors at once,
    which show the beginning of the answer. Redirects are followed, as ``POST``, on the same scheme, host and port only.
    Answers are remembered by prompt and texts.

    Secrets belong in environment variables, which are read at every request and saved nowhere.

    Args:
        url: where to send requests, ``http`` or ``https``.
        headers: further request headers that are no secrets.
        headers_from_env: header -> name of the environment variable that holds its value.
        token_env: environment variable that holds a token, sent as ``Authorization: Bearer <token>``.
        timeout: seconds that one attempt may take from connection to the last byte, positive.
        retries: further attempts after the first, 0 or more.
        backoff: seconds before the second attempt, 0 or more; doubles each time.
        batch_size: pairs per request, 1 or more.
        concurrency: requests under way at a time, 1 or more.
        cache_size: answers remembered, 0 or more.

    Raises:
        ValueError: for an argument outside its range, an environment variable that is not set, or a masked secret out
            of a saved configuration.
    """

    def __init__(
        self,
        url: str,
        headers: dict[str, str] | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        batch_size: int = 64,
        concurrency: int = 4,
        cache_size: int = 100_000,
        headers_from_env: dict[str, str] | None = None,
        token_env: str | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must start with http:// or https://, got {url!r}")
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout must be > 0 and finite, got {timeout}")
        for name, value, low in (
            ("retries", retries, 0), ("backoff", backoff, 0), ("cache_size", cache_size, 0),
            ("batch_size", batch_size, 1), ("concurrency", concurrency, 1),
        ):  # fmt: skip
            if not low <= value < float("inf"):
                raise ValueError(f"{name} must be >= {low} and finite, got {value}")
        if masked := [name for name, value in (headers or {}).items() if MASK in value]:
            raise ValueError(f"headers must hold no masked secret, got {masked}: use headers_from_env or token_env")
        if MASK in url:
            raise ValueError(f"url must hold no masked secret, got {url!r}: send it as a header, see headers_from_env")
        self.url = url
        self.headers = {"Content-Type": "application/json", **(headers or {})}
        self.headers_from_env = dict(headers_from_env or {})
        self.token_env = token_env
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.batch_size = batch_size
        self.concurrency = concurrency
        self.cache_size = cache_size
        self._cache: OrderedDict[str, float] = OrderedDict()
        self._name = f"judge at {mask_secrets(url)}"
        self._secret_headers()

    def __call__(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> Tensor:
        """See :class:`PairwiseJudge`.

        Raises:
            RuntimeError: if the server keeps failing; names the URL, the attempts and the last error.
            ValueError: if its answer has no ``preferences``, or another number of them.
        """
        pairs = list(zip(prompts, a, b, strict=True))
        keys = [hashlib.sha256(json.dumps(pair).encode()).hexdigest() for pair in pairs]
        answers = {key: self._cache[key] for key in keys if key in self._cache}
        missing = list({key: pair for key, pair in zip(keys, pairs, strict=True) if key not in answers}.items())
        parts = [missing[start : start + self.batch_size] for start in range(0, len(missing), self.batch_size)]
        values = map_in_background(self._ask, [[pair for _, pair in part] for part in parts], self.concurrency)
        for (key, _), value in zip(chain(*parts), chain.from_iterable(values), strict=True):
            answers[key] = value
        for key, value in answers.items():
            if 0.0 <= value <= 1.0:  # what query_judge is going to refuse is not remembered
                self._cache[key] = value
                self._cache.move_to_end(key)
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return torch.tensor([answers[key] for key in keys])

    def _secret_headers(self) -> dict[str, str]:
        variables = {**self.headers_from_env, **({"Authorization": self.token_env} if self.token_env else {})}
        if unset := [name for name in variables.values() if not os.environ.get(name)]:
            raise ValueError(f"environment variable {unset[0]} must be set for the {self._name}, got nothing")
        values = {header: os.environ[name] for header, name in variables.items()}
        return {**values, "Authorization": f"Bearer {values['Authorization']}"} if self.token_env else values

    def _ask(self, pairs: list[tuple[Prompt, str, str]]) -> list[float]:
        prompts, a, b = zip(*pairs, strict=True)
        body = json.dumps({"prompts": prompts, "a": a, "b": b}).encode()
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                # A socket's timeout is per read: only waiting for another thread bounds the whole attempt.
                answer = json.loads(in_background(lambda: self._post(body)).result(self.timeout))
                break
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {error.reason}"
                if error.code < 500 and error.code not in (408, 429):
                    text = error.fp.read(300).decode(errors="replace") if error.fp else ""
                    raise RuntimeError(f"{self._name} refused the request: {problem}: {text}") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = (
                    f"{type(error).__name__}: {error}" if str(error) else f"no answer in {self.timeout} s (timeout)"
                )
        else:
            raise RuntimeError(f"{self._name} failed {self.retries + 1} times; last: {problem}")
        values = answer.get("preferences") if isinstance(answer, dict) else None
        if not isinstance(values, list) or len(values) != len(pairs):
            raise ValueError(f'{self._name} must answer {{"preferences": [{len(pairs)} numbers]}}, got {answer!r:.200}')
        try:
            return [float("nan") if value is None else float(value) for value in values]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._name} must answer with numbers, got {values!r:.200}") from error

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, data=body, headers={**self.headers, **self._secret_headers()})
        with urllib.request.build_opener(_SameOriginPost).open(request, timeout=self.timeout) as response:
            return response.read()


class _SameOriginPost(urllib.request.HTTPRedirectHandler):
    """Follows redirects as they are, with method, body and headers, but never to another scheme, host or port."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        target = urljoin(req.full_url, newurl)
        here, there = urlsplit(req.full_url), urlsplit(target)
        if code == 303 or (here.scheme, here.netloc) != (there.scheme, there.netloc):
            reason = (
                f"redirect to {mask_secrets(target)}, which is not followed; give that address as url if it is right"
            )
            raise urllib.error.HTTPError(req.full_url, code, reason, headers, None)
        return urllib.request.Request(target, data=req.data, headers=dict(req.header_items()), method="POST")

    def http_error_308(self, *arguments: Any) -> Any:
        return self.http_error_302(*arguments)
