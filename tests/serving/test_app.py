"""The server, with OpenAI's client over a real socket."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import http.client
import json
import random
import re
import threading
import time

import flax.linen as nn
import httpx
import jax
import jsonschema
import numpy as np
import openai
import pytest

from selfimprove_jax.data import tokenizer as tokenizer_lib
from selfimprove_jax.language_models.chat import ChatTemplate
from selfimprove_jax.language_models.local import LocalModel
from selfimprove_jax.models import llama
from selfimprove_jax.sampling.engine import Engine
from selfimprove_jax.sampling.requests import Completion, ScoreRequest, TokenLogprobs, Update
from selfimprove_jax.sampling.text_stream import TextStream
from selfimprove_jax.serving import run
from selfimprove_jax.serving.app import make_app
from selfimprove_jax.serving.schema import TextBody
from selfimprove_jax.serving.service import EngineService

_TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MAX_LENGTH = 128
_USER = [{"role": "user", "content": "the cat"}]


@dataclasses.dataclass(frozen=True)
class Files:
  """The parts of a checkpoint besides its weights."""

  tokenizer: tokenizer_lib.Tokenizer
  chat: ChatTemplate | None

  @property
  def eos_ids(self):
    return self.chat.stop_ids if self.chat else (self.tokenizer.eos_id,)

  @property
  def vocab_size(self):
    return self.tokenizer.vocab_size + 20


@pytest.fixture(scope="module")
def files() -> Files:
  texts = ['the cat sat on the mat, and then the cat ran {"name": "x", "n": 3}'] * 3
  tokenizer = tokenizer_lib.train_bpe(texts, vocab_size=300)
  tokenizer.backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
  special = {"eos_token": tokenizer.eos_token}
  chat = ChatTemplate(tokenizer, _TEMPLATE, special_tokens=special, eos_ids=(tokenizer.eos_id,))
  return Files(tokenizer, chat)


class ScriptedEngine:
  """A fake engine whose tokens depend on the seed, record, sample and prompt."""

  num_slots = 4
  max_length = _MAX_LENGTH

  def __init__(self, files):
    self.tokenizer, self.eos_ids, self.vocab_size = (
      files.tokenizer,
      files.eos_ids,
      files.vocab_size,
    )
    self.seconds = 0.0
    self.fail: Exception | None = None
    self._queue, self._slots, self._ticket = [], {}, 0

  num_running = property(lambda self: len(self._slots))
  num_waiting = property(lambda self: len(self._queue))

  def stats(self):
    return {"new_tokens": self._ticket}

  def submit(self, request, on_update=None):
    self._ticket += 1
    draws = random.Random(
      f"{request.seed} {request.record_id} {request.sample} {list(request.prompt)}"
    )
    if request.sampling.temperature == 0:
      draws = random.Random(str(list(request.prompt)))
    text = TextStream(self.tokenizer.decode, request.stop_strings)
    matcher = request.grammar.start() if request.grammar else None
    self._queue.append((self._ticket, (request, on_update, draws, text, matcher, [], [])))
    return self._ticket

  def cancel(self, ticket):
    self._queue = [entry for entry in self._queue if entry[0] != ticket]
    self._slots.pop(ticket, None)

  def step(self):
    time.sleep(self.seconds)
    if self.fail is not None:
      error, self.fail = self.fail, None
      raise error
    while self._queue and len(self._slots) < self.num_slots:
      ticket, entry = self._queue.pop(0)
      self._slots[ticket] = entry
    for ticket, entry in list(self._slots.items()):
      if self._advance(*entry):
        self._slots.pop(ticket, None)
    return []

  def _advance(self, request, on_update, draws, text, matcher, tokens, logprobs):
    allowed = range(4, self.tokenizer.vocab_size)
    if matcher is not None:
      row = np.zeros(-(-self.vocab_size // 32), np.uint32)
      matcher.allow(row)
      allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
    token = draws.choice(allowed)
    ends = {*self.eos_ids, *request.stop_ids}
    finish, new = None, []
    if token in ends and len(tokens) >= request.min_new_tokens:
      finish, piece, stop = "stop", text.finish(), token
    else:
      new, piece = [token], text.push(token)
      tokens.append(token)
      logprobs.append(TokenLogprobs(-1.0, ((token, -1.0), (4, -2.0))[: request.top_logprobs]))
      if matcher is not None:
        matcher.accept(token)
      room = min(request.max_new_tokens, self.max_length - len(request.prompt))
      if text.stop is not None or (matcher is not None and matcher.is_finished):
        finish, stop = "stop", text.stop
      elif len(tokens) == room:
        finish, stop = "length", None
      if finish:
        piece += text.finish()
    wanted = request.top_logprobs is not None
    completion = finish and Completion(
      list(tokens), finish, text.text, stop, list(logprobs) if wanted else None
    )
    on_update(Update(new, piece, logprobs[-len(new) :] * bool(new) if wanted else None, completion))
    return finish


@contextlib.contextmanager
def _serving(engine, files, *, key=None, max_waiting=64):
  model = LocalModel(
    engine,
    name="not the served name",
    config=_config(files),
    tokenizer=files.tokenizer,
    chat=files.chat,
    eos_ids=files.eos_ids,
    prefix_ids=(),
  )
  service = EngineService(engine, max_waiting=max_waiting)
  sock = run.bind("127.0.0.1", 0)
  ready = threading.Event()
  app = make_app(service, model, name="tiny", host="127.0.0.1", key=key, max_body_bytes=20_000)
  server = run.Server(app, service, drain_seconds=5, on_ready=ready.set)
  thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
  thread.start()
  assert ready.wait(10)
  try:
    yield run.url(sock)
  finally:
    server.should_exit = True
    thread.join(20)
    sock.close()
    assert not thread.is_alive()
  assert service.stopped == "the server shuts down"


def _client(url, key="none"):
  return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=30)


def _config(files):
  return llama.LlamaConfig(
    vocab_size=files.vocab_size,
    num_layers=1,
    embed_dim=16,
    mlp_dim=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    dtype="float32",
  )


@pytest.fixture(scope="module")
def engine(files, one_device_mesh) -> Engine:
  """The engine of a tiny model with random weights."""
  model = llama.Llama(_config(files))
  init = jax.jit(functools.partial(llama.init_params, model))
  return Engine(
    model,
    nn.unbox(init(jax.random.key(0))),
    one_device_mesh,
    eos_ids=files.eos_ids,
    pad_id=files.tokenizer.pad_id,
    num_slots=8,
    max_length=_MAX_LENGTH,
    decode_text=files.tokenizer.decode,
  )


@pytest.fixture(scope="module")
def url(engine, files):
  with _serving(engine, files) as url:
    yield url


@pytest.fixture(scope="module")
def client(url):
  with _client(url) as client:
    yield client


def _ask(client, **options):
  options = {"model": "tiny", "messages": _USER, "max_tokens": 12, "seed": 1, **options}
  return client.chat.completions.create(**options)


def _text(client, **options):
  options = {"model": "tiny", "prompt": "the cat", "max_tokens": 12, "seed": 1, **options}
  return client.completions.create(**options)


def test_models_are_listed(client):
  assert [model.id for model in client.models.list()] == ["tiny"]
  assert client.models.retrieve("tiny").id == "tiny"
  with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
    client.models.retrieve("gpt")


def test_chat_responses_have_the_fields_of_openais(client, files):
  reply = _ask(client)
  choice = reply.choices[0]
  assert (choice.message.role, choice.finish_reason) in {
    ("assistant", r) for r in ("stop", "length")
  }
  prompt = files.chat.render(_USER)
  assert reply.usage.prompt_tokens == len(prompt)
  assert reply.usage.total_tokens == len(prompt) + reply.usage.completion_tokens
  assert 1 <= reply.usage.completion_tokens <= 12
  assert (reply.object, reply.model, reply.id[:9]) == ("chat.completion", "tiny", "chatcmpl-")


def test_32_callers_at_once_get_what_each_gets_alone(client):
  with concurrent.futures.ThreadPoolExecutor(32) as pool:
    together = list(pool.map(lambda i: _ask(client, seed=i).choices[0].message.content, range(32)))
  assert together == [_ask(client, seed=i).choices[0].message.content for i in range(32)]
  assert len(set(together)) > 16


def test_streamed_pieces_make_up_the_whole(client):
  whole = _ask(client, n=2, max_tokens=40)
  with _ask(client, n=2, max_tokens=40, stream=True, stream_options={"include_usage": True}) as s:
    chunks = list(s)
  texts, ends, roles = ["", ""], {}, {}
  for chunk in chunks[:-1]:
    [choice] = chunk.choices
    texts[choice.index] += choice.delta.content or ""
    roles.setdefault(choice.index, choice.delta.role)
    if choice.finish_reason:
      assert choice.index not in ends
      ends[choice.index] = choice.finish_reason
  assert texts == [choice.message.content for choice in whole.choices]
  assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
  assert roles == {0: "assistant", 1: "assistant"}
  assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
  assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_other_chunks_have_no_usage_where_one_has_it(client):
  options = {"stream": True, "stream_options": {"include_usage": True}}
  *others, last = [chunk.model_dump() for chunk in _ask(client, **options)]
  assert all("usage" in chunk and chunk["usage"] is None for chunk in others)
  assert last["usage"]["total_tokens"] > 0


def test_fields_that_ask_for_nothing_are_accepted(client):
  body = {"tools": None, "tool_choice": None, "functions": None, "logit_bias": None}
  plain = _ask(client).choices[0].message.content
  for extra in (body, {"tools": []}, {"tool_choice": "none"}, {"tools": [], "tool_choice": "auto"}):
    assert _ask(client, extra_body=extra).choices[0].message.content == plain


def test_an_assistant_that_called_a_tool_may_have_said_nothing(client):
  call = {"id": "x", "type": "function", "function": {"name": "<|im_end|>", "arguments": "{}"}}
  messages = [*_USER, {"role": "assistant", "tool_calls": [call]}, *_USER]
  assert _ask(client, messages=messages).choices[0].finish_reason in ("stop", "length")


def test_a_special_token_as_a_stop_string_is_a_stop_token(files):
  """It has no text in which a string could be found."""
  special = files.tokenizer.backend.token_to_id("<|im_start|>")
  body = TextBody(model="tiny", prompt=[5], stop=["<|im_start|>", "x"], stop_token_ids=[7])
  [request] = body.requests(
    [[5]], max_length=9, grammar=None, stop_strings=(), special_ids={"<|im_start|>": special}
  )
  assert (request.stop_ids, request.stop_strings) == ((7, special), ("x",))


def test_special_tokens_of_a_rendered_prompt_are_recognized(client, files):
  """A client that renders the chat itself gets what /v1/chat/completions gives."""
  text = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
  assert _text(client, prompt=text).usage.prompt_tokens == len(files.chat.render(_USER))
  assert _text(client, prompt=text).choices[0].text == _ask(client).choices[0].message.content


def test_echo_with_logprobs_tells_those_of_the_prompt(client, engine, files):
  """As lm-eval asks: prompts of ids, with and without a new token."""
  prompts = [files.tokenizer.encode(text) for text in ("the cat sat on the mat", "then")]
  options = {"prompt": prompts, "echo": True, "logprobs": 2, "temperature": 0}
  for max_tokens in (0, 1):
    reply = _text(client, max_tokens=max_tokens, **options)
    for prompt, choice in zip(prompts, reply.choices, strict=True):
      found = choice.logprobs
      assert len(found.tokens) == len(prompt) + max_tokens
      assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
      [score] = engine.score([ScoreRequest(prompt=prompt[:1], continuation=prompt[1:])])
      np.testing.assert_allclose(found.token_logprobs[1 : len(prompt)], score.logprobs, atol=1e-6)
      best = [max(top.values()) for top in found.top_logprobs[1 : len(prompt)]]
      is_greedy = all(a == b for a, b in zip(best, found.token_logprobs[1 : len(prompt)]))
      assert is_greedy == score.is_greedy
      assert all(len(top) == 2 for top in found.top_logprobs[1:])
      assert choice.text.startswith(files.tokenizer.decode(prompt))
  with pytest.raises(openai.BadRequestError, match="max_tokens: 0 is possible only with echo"):
    _text(client, max_tokens=0)


@pytest.mark.parametrize("value", [2**31, 2**63, -1, 1e400, float("nan")])
@pytest.mark.parametrize("field", ["top_k", "min_tokens", "max_tokens", "n", "logprobs", "top_p"])
def test_numbers_out_of_range_are_refused_and_harm_nobody(url, client, field, value):
  number = {1e400: "1e400"}.get(value, "NaN" if value != value else str(value))
  body = f'{{"model": "tiny", "prompt": "the cat", "{field}": {number}}}'
  headers = {"content-type": "application/json"}
  reply = httpx.post(f"{url}/completions", content=body, headers=headers)
  allowed = field == "max_tokens" and value in (2**31, 2**63)  # the room that there is
  assert reply.status_code == (200 if allowed else 400), reply.text
  assert _text(client).choices[0].finish_reason in ("stop", "length")


def test_a_constraint_that_no_text_meets_is_refused(client):
  with pytest.raises(openai.BadRequestError, match=r"allows no text|cannot be enforced"):
    _ask(client, extra_body={"regex": "[^\\s\\S]"})


def test_usage_is_streamed_only_if_asked_for(client):
  assert all(chunk.usage is None for chunk in _ask(client, stream=True))


def test_streamed_text_completion_is_that_of_the_whole(client):
  whole = _text(client, n=3, logprobs=2)
  texts, tokens, offsets = [""] * 3, [[], [], []], [[], [], []]
  for chunk in _text(client, n=3, logprobs=2, stream=True):
    choice = chunk.choices[0]
    texts[choice.index] += choice.text
    if choice.logprobs:
      tokens[choice.index] += choice.logprobs.tokens
      offsets[choice.index] += choice.logprobs.text_offset
  assert texts == [choice.text for choice in whole.choices]
  assert tokens == [choice.logprobs.tokens for choice in whole.choices]
  assert offsets == [choice.logprobs.text_offset for choice in whole.choices]


def test_logprobs_spell_the_tokens_that_were_drawn(client, files):
  [choice] = _ask(client, logprobs=True, top_logprobs=2).choices
  places = choice.logprobs.content
  special = {token.content for token in files.tokenizer.backend.get_added_tokens_decoder().values()}
  value = b"".join(bytes(place.bytes) for place in places if place.token not in special)
  assert value.decode(errors="replace") == choice.message.content
  assert all(place.logprob <= 0 and len(place.top_logprobs) == 2 for place in places)
  for place in places:
    with contextlib.suppress(UnicodeDecodeError):
      assert bytes(place.bytes).decode() == place.token
  assert _ask(client).choices[0].logprobs is None
  none_of_others = _ask(client, logprobs=True).choices[0].logprobs.content
  assert [place.top_logprobs for place in none_of_others] == [[]] * len(none_of_others)


def test_the_seed_decides_whatever_else_is_served(client):
  alone = _ask(client, seed=-5, n=3)
  texts = [choice.message.content for choice in alone.choices]
  assert len(set(texts)) == 3
  assert _ask(client, seed=-5).choices[0].message.content == texts[0]
  assert _ask(client, seed=2**40 - 5).choices[0].message.content != texts[0]
  assert _ask(client, seed=None).choices[0].message.content not in texts


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_string_ends_the_text_and_is_left_out(client, as_list):
  text = _text(client, max_tokens=60).choices[0].text
  stop = text[20:23]
  choice = _text(client, max_tokens=60, stop=[stop, "never so"] if as_list else stop).choices[0]
  assert choice.text == text[: text.index(stop)]
  assert choice.finish_reason == "stop"
  streamed = _text(client, max_tokens=60, stop=stop, stream=True)
  assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text


def test_several_prompts_of_text_and_ids_keep_their_order(client, files):
  prompts = ["the cat", "the mat"]
  ids = [files.tokenizer.encode(prompt) for prompt in prompts]
  of_text = _text(client, prompt=prompts, n=2)
  assert [choice.index for choice in of_text.choices] == [0, 1, 2, 3]
  of_ids = _text(client, prompt=ids, n=2)
  assert [c.text for c in of_ids.choices] == [c.text for c in of_text.choices]
  assert of_text.usage.prompt_tokens == sum(map(len, ids))
  assert _text(client, prompt=ids[1]).choices[0].text == of_text.choices[2].text


def test_echo_begins_with_the_prompt(client):
  text = _text(client).choices[0].text
  assert _text(client, echo=True).choices[0].text == "the cat" + text
  streamed = _text(client, echo=True, stream=True)
  assert "".join(chunk.choices[0].text for chunk in streamed) == "the cat" + text


_SCHEMA = {
  "type": "object",
  "properties": {
    "name": {"type": "string", "maxLength": 5},
    "n": {"type": "integer", "minimum": 0, "maximum": 99},
  },
  "required": ["name", "n"],
  "additionalProperties": False,
}


def test_json_schema_is_kept_to(client):
  form = {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA, "strict": True}}
  for choice in _ask(client, response_format=form, max_tokens=90, n=8).choices:
    jsonschema.validate(json.loads(choice.message.content), _SCHEMA)
    assert choice.finish_reason == "stop"


def test_choices_and_regular_expressions_are_kept_to(client):
  choices = ["yes", "yes, please", "no"]
  got = _ask(client, n=16, extra_body={"choices": choices}).choices
  assert {choice.message.content for choice in got} == set(choices)
  pattern = "[0-9]{3}-[a-f]{2}"
  got = _text(client, n=4, extra_body={"regex": pattern}).choices
  assert all(re.fullmatch(pattern, choice.text) for choice in got)


def test_json_object_begins_as_one(client):
  [choice] = _ask(client, response_format={"type": "json_object"}).choices
  assert choice.message.content.startswith("{")


@pytest.mark.parametrize(
  ("options", "reason", "param"),
  [
    ({"messages": []}, "messages is empty", "messages"),
    ({"messages": "hi"}, "messages: Input should be a valid array", "messages"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "has role 'wizard'", "messages"),
    ({"messages": [{"role": "user", "content": 3}]}, "content is 3", "messages"),
    ({"messages": [{"role": "user", "content": "cat " * 200}]}, "may have 128", "messages"),
    ({"stop": 3}, "stop: Input should be a valid string; or: ", "stop"),
    ({"stop": [""]}, "at least 1 character", "stop"),
    ({"stop": ["a", 3]}, "stop: ", "stop"),
    ({"temperature": -1}, "temperature: Input should be greater than or equal to 0", "temperature"),
    ({"temperature": "hot"}, "temperature: Input should be a valid number", "temperature"),
    ({"top_p": 0}, "top_p: Input should be greater than 0", "top_p"),
    ({"n": 0}, "n: ", "n"),
    ({"n": 65}, "less than or equal to 64", "n"),
    ({"max_tokens": 0}, "max_tokens: ", "max_tokens"),
    ({"top_logprobs": 3}, "needs logprobs=true", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20", "top_logprobs"),
    ({"logit_bias": {"5": 1}}, "logit_bias is not supported", "logit_bias"),
    ({"tools": [{"type": "function"}]}, "tools is not supported", "tools"),
    ({"extra_body": {"beams": 3}}, "beams is not supported", "beams"),
    ({"extra_body": {"choices": []}}, "at least 1 item", "choices"),
    ({"extra_body": {"choices": [""]}}, "none may be empty", "choices"),
    ({"extra_body": {"regex": "("}}, "unclosed group", "regex"),
    ({"extra_body": {"regex": "a", "choices": ["a"]}}, "exclude one another", None),
    ({"response_format": {"type": "json_schema"}}, "is needed for type", "response_format"),
    (
      {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objct"}}}},
      "Invalid type: objct",
      "response_format",
    ),
    ({"stream_options": {"include_usage": True}}, "needs stream=true", "stream_options"),
  ],
)  # fmt: skip
def test_bad_request_is_refused_with_the_field_and_the_reason(client, options, reason, param):
  with pytest.raises(openai.BadRequestError) as caught:
    _ask(client, **options)
  assert caught.value.status_code == 400
  assert reason in caught.value.body["message"]
  assert caught.value.body["param"] == param
  assert caught.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a", ""], [-1], [10_000], "cat " * 200])
def test_bad_prompt_is_refused(client, prompt):
  with pytest.raises(openai.BadRequestError) as caught:
    _text(client, prompt=prompt)
  assert caught.value.body["param"] == "prompt"


def test_unknown_model_is_not_found(client):
  for ask in (_ask, _text):
    with pytest.raises(openai.NotFoundError) as caught:
      ask(client, model="gpt-4")
    assert caught.value.body["code"] == "model_not_found"


def _post(url, **options):
  options = {
    "headers": {"content-type": "application/json"},
    "content": b"{}",
    "timeout": 60,
  } | options
  return httpx.post(f"{url}/chat/completions", **options)


def test_errors_of_http_have_openais_shape(url):
  def chunked():
    for _ in range(30):
      yield b" " * 1000

  body = {"model": "tiny", "messages": _USER}
  assert _post(url, content=json.dumps(body).encode()).status_code == 200
  for answer, status in (
    (_post(url, content=b" " * 20_001), 413),
    (_post(url, content=chunked()), 413),
    (_post(url, content=b"{nonsense"), 400),
    (_post(url, content=b"[]"), 400),
    (_post(url, content=json.dumps(body | {"temperature": float("nan")}).encode()), 400),
    (_post(url, content=b'{"model": "\xff"}'), 400),
    (_post(url, headers={"content-type": "text/plain"}), 415),
    (_post(url, headers={"content-type": "application/json", "host": "evil.example"}), 403),
    (httpx.get(f"{url}/nothing"), 404),
    (httpx.get(f"{url}/chat/completions"), 405),
  ):
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_health_and_metrics_report_the_state(url, client):
  _ask(client)
  root = url.removesuffix("/v1")
  assert httpx.get(f"{root}/health").json() == {"status": "ok"}

  def metrics():
    lines = httpx.get(f"{root}/metrics").text.splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))

  _until(lambda: metrics()["selfimprove_running"] == "0.0")  # published after the step
  values = metrics()
  assert values["selfimprove_waiting"] == "0.0"
  for name in ("request_seconds", "time_to_first_token_seconds"):
    assert float(values[f"selfimprove_{name}_sum"]) > 0
    assert float(values[f"selfimprove_{name}_count"]) > 0
  assert values.keys() >= {
    "selfimprove_engine_requests_total",
    "selfimprove_engine_new_tokens_total",
    "selfimprove_engine_calls_total",
  }
  assert any(name.startswith("selfimprove_completions_total{outcome=") for name in values)
  assert all(re.fullmatch(r'[a-z_]+(\{[a-z]+="[a-z]+"\})?', name) for name in values)


def test_requests_need_the_key(files):
  with _serving(ScriptedEngine(files), files, key="sesam-öffne") as url:
    assert httpx.get(f"{url.removesuffix('/v1')}/health").status_code == 200
    for headers in (
      {},
      {"authorization": "Bearer sesam"},
      {"authorization": "sesam-öffne".encode()},
    ):
      answer = httpx.get(f"{url}/models", headers=headers)
      assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
      assert "sesam" not in answer.text
    assert httpx.get(f"{url.removesuffix('/v1')}/metrics").status_code == 401
    bearer = {"authorization": "Bearer sesam-öffne".encode(), "host": "other.example"}
    assert httpx.get(f"{url}/models", headers=bearer).status_code == 200


def test_server_that_is_full_says_so(files):
  engine = ScriptedEngine(files)
  engine.seconds = 0.05
  with _serving(engine, files, max_waiting=0) as url, _client(url) as client:
    running = _ask(client, n=4, max_tokens=100, stream=True)
    next(running)
    with pytest.raises(openai.RateLimitError) as caught:
      _ask(client)
    assert caught.value.response.headers["retry-after"]
    with pytest.raises(openai.BadRequestError, match="at most 4"):
      _ask(client, n=5)
    running.close()


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_away_frees_its_slot(files, stream):
  engine = ScriptedEngine(files)
  engine.seconds = 0.05
  body = {"model": "tiny", "messages": _USER, "max_tokens": 100, "n": 4, "stream": stream}
  body["regex"] = "a{200}"  # it would run to its limit
  with _serving(engine, files) as url:
    connection = http.client.HTTPConnection(url.split("/")[2])
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    if stream:
      assert connection.getresponse().readline().startswith(b"data: {")
    _until(lambda: engine.num_running == 4)
    connection.close()
    _until(lambda: engine.num_running == 0, seconds=4)


def _until(condition, seconds=10):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "never happened"
    time.sleep(0.005)


def test_engine_that_fails_is_an_error_of_the_server(files):
  engine = ScriptedEngine(files)
  with _serving(engine, files) as url, _client(url) as client:
    engine.fail = RuntimeError("out of memory")
    with pytest.raises(openai.InternalServerError, match="out of memory"):
      _ask(client)
    engine.fail = RuntimeError("out of memory")
    with pytest.raises(openai.APIError, match="out of memory"):
      list(_ask(client, stream=True))
    assert _ask(client).choices


def test_model_without_a_chat_template_says_what_to_do(files):
  bare = dataclasses.replace(files, chat=None)
  with _serving(ScriptedEngine(files), bare) as url, _client(url) as client:
    with pytest.raises(openai.BadRequestError, match="no chat template"):
      _ask(client)
    assert _text(client).choices
