"""Damages the responses of an endpoint: a reply or its error, and later requests are answered.

python -m tests.fuzz.endpoint_replies --minutes 10 --seed 0
"""

import contextlib
import json
import pathlib
import random
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from selfimprove_jax.language_models import ScoreRequest, TextRequest
from selfimprove_jax.language_models.chat_api import Prices
from selfimprove_jax.language_models.endpoint import Endpoint
from selfimprove_jax.language_models.openai_client import EndpointError, Limits, Retries, Timeouts
from selfimprove_jax.language_models.protocol import Reply, Score
from selfimprove_jax.language_models.store import CallStore
from tests.fuzz import harness
from tests.language_models.conftest import Said, Server

_KEY, _DAMAGED = "sk-a-very-secret-key-0123456789", "damaged"
_STATUSES = (201, 204, 206, 301, 304, 307, 400, 401, 402, 404, 408, 418, 422, 429, 500, 503, 529)
_HEADERS: list[tuple[str, list[str]]] = [
  (
    "Retry-After",
    ["0", "-1", "1e6", "nan", "inf", "x", "Wed, 21 Oct 2015 07:28:00 GMT", "9" * 400],
  ),
  ("retry-after-ms", ["0", "nan", "-5", "1e400", "x"]),
  (
    "Content-Type",
    ["text/html", "text/event-stream", "application/json; charset=rot13", "", "x/;="],
  ),
  (
    "Content-Type",
    [f"application/json; charset={c}" for c in ("utf-16", "utf-7", "x", "hex", "zip")],
  ),
  ("Content-Encoding", ["gzip", "br", "zstd", "deflate", "x", "gzip, gzip"]),
  ("Location", ["/", "http://127.0.0.1:1/", "file:///etc/hosts", "//", "http://[", "/v1/" * 99]),
  ("Transfer-Encoding", ["chunked", "x"]),
  ("Set-Cookie", ["a=b; Max-Age=x", "=" * 99]),
]
_VALUES: list[Any] = [
  *(None, True, False, 0, -1, 1.5, 2**62, 2**70, 1e30, float("nan"), float("inf"), 10**4000),
  *("", "x", "\ud800", "\0", "length", "content_filter", "é" * 99, _KEY, [], [None], {}, {"a": 1}),
  *([[]], ["x", 1], [{"type": "text", "text": None}], {"content": []}, {"refusal": "no"}),
]
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_TEXTS = ['{"a": 1}', "[" * 5000, '{"a": NaN}', "```json\n{}\n```", "", '{"a": 1e400}', "x" * 9999]


def _token(text: str) -> dict[str, Any]:
  entry = {"token": text, "logprob": -0.5, "bytes": None}
  return {**entry, "top_logprobs": [entry, {**entry, "token": "other", "logprob": -1.5}]}


def whole_response(text: str) -> dict[str, Any]:
  """A response to chats, texts and scores of the prompt "one two", with log-probabilities."""
  logprobs = {
    "content": [_token("yes")],
    "tokens": ["one", " two", "."],
    "token_logprobs": [None, -0.5, -0.5],
    "top_logprobs": [None, {" two": -0.5}, {".": -0.5}],
    "text_offset": [0, 3, 7],
  }
  message = {"role": "assistant", "content": text, "refusal": None}
  choice = {"index": 0, "message": message, "text": text, "logprobs": logprobs}
  return {
    "id": "x",
    "object": "chat.completion",
    "choices": [{**choice, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3},
    "error": None,
  }


def change(rng: random.Random, value: Any) -> Any:
  """Returns a JSON value with another value of any type in one place, at any depth."""
  if isinstance(value, dict) and value and rng.random() < 0.9:
    key = rng.choice(list(value))
    if rng.random() < 0.1:
      return {k: v for k, v in value.items() if k != key}
    return {**value, key: change(rng, value[key])}
  if isinstance(value, list) and value and rng.random() < 0.8:
    at = rng.randrange(len(value))
    return [*value[:at], change(rng, value[at]), *value[at + 1 :]]
  return rng.choice(_VALUES)


def make_response(seed: int) -> Said:
  """Returns a response; the same one for the same seed."""
  rng = random.Random(seed)
  value = whole_response(rng.choice(_TEXTS) if rng.random() < 0.4 else "yes")
  if rng.random() < 0.4:
    del value["choices"][0]["logprobs"]["content"]  # the form of completions
  for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
    value = change(rng, value)
  body = json.dumps(value, ensure_ascii=rng.random() < 0.8).encode(errors="surrogatepass")
  if rng.random() < 0.25:
    body = harness.damage(rng, body)
  names = rng.choices(_HEADERS, k=rng.choice([0, 0, 1, 2]))
  headers = {name: rng.choice(values) for name, values in names}
  # Without the end of the connection the client would wait for the next chunk until its timeout.
  cut = len(body) if "Transfer-Encoding" in headers else None
  if rng.random() < 0.1:
    cut = rng.randrange(len(body) + 1)
  status = rng.choice(_STATUSES) if rng.random() < 0.25 else 200
  return Said(body, status=status, headers=headers, cut=cut)


def make_request(seed: int) -> TextRequest | ScoreRequest:
  """Returns a request of any kind, whose response is damaged."""
  rng = random.Random(seed)
  kind = rng.choice(["chat", "text", "score", "schema", "choices", "logprobs"])
  if kind == "score":
    return ScoreRequest(context="one", continuation=" two", id=_DAMAGED)
  options: dict[str, Any] = {
    "text": {"top_logprobs": rng.choice([None, 2])},
    "schema": {"json_schema": _SCHEMA},
    "choices": {"choices": ["yes", "no"]},
    "logprobs": {"top_logprobs": 2},
  }.get(kind, {})
  prompt = "one two" if kind == "text" else [{"role": "user", "content": _DAMAGED}]
  return TextRequest(prompt=prompt, max_tokens=20, id=_DAMAGED, **options)


def check(result: Reply | Score) -> None:
  """Raises AssertionError for a result that no file could hold, or that shows the key."""
  text = json.dumps(result.to_json(), allow_nan=False)
  text.encode()
  assert _KEY not in text, "the key is shown"
  assert result.cost_usd >= 0
  if isinstance(result, Reply):
    assert isinstance(result.text, str)
    assert result.usage.prompt_tokens >= 0
  else:
    assert result.error is not None or result.logprob <= 0, result
  assert type(result).from_json(json.loads(text)).id == result.id


@contextlib.contextmanager
def opened() -> Iterator[Callable[[int], str | None]]:
  """Yields the fuzzer, with one server and one store."""
  server = Server()
  with tempfile.TemporaryDirectory() as scratch, _environment():
    store = CallStore(pathlib.Path(scratch) / "calls.sqlite", max_usd=None)

    def try_seed(seed: int) -> str | None:
      response, request = make_response(seed), make_request(seed)
      calls = 0

      def behave(call: Any) -> Said:
        nonlocal calls
        if "well" in str(call.body.get("messages")):
          return Said(whole_response("fine"))
        calls += 1
        return response

      server.behave = behave
      server.calls.clear()
      model = Endpoint(
        server.url,
        "some-model",
        store=store,
        prices=Prices(1.0, 2.0),
        api_key_env="FUZZED_KEY",
        identity=f"model {seed}",
        limits=Limits(max_concurrent=2),
        retries=Retries(max_attempts=2, initial_seconds=0.001, max_seconds=0.002),
        timeouts=Timeouts(connect=5.0, read=5.0, total=5.0),
        max_repairs=1,
      )
      well = TextRequest(prompt=[{"role": "user", "content": "well"}], max_tokens=5, id="well")
      try:
        if isinstance(request, ScoreRequest):
          results = [*model.score([request]), *model.generate([well])]
        else:
          results = list(model.generate([request, well]))
        for result in results:
          check(result)
        [again] = (model.score if isinstance(request, ScoreRequest) else model.generate)([request])
        check(again)
        if results[1].text != "fine" or results[1].error is not None:
          return f"the next request is not answered: {results[1]}"
        if results[0].error is None and not again.cached:
          return f"a good answer is not kept: {results[0]}"
      except EndpointError as error:
        return "the key is shown" if _KEY in str(error) else None
      finally:
        model.close()
      return None

    try:
      yield try_seed
    finally:
      store.close()
      server.close()


@contextlib.contextmanager
def _environment() -> Iterator[None]:
  import os

  os.environ["FUZZED_KEY"] = _KEY
  try:
    yield
  finally:
    del os.environ["FUZZED_KEY"]


if __name__ == "__main__":
  harness.main(__doc__, opened)
