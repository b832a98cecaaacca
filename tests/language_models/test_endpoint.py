import asyncio
import contextlib
import email.utils
import gzip
import logging
import os
import pathlib
import threading
import time
import tracemalloc

import pytest

from selfimprove_jax.language_models import (
  LanguageModel,
  ScoreRequest,
  TextRequest,
  TokenLogprob,
  openai_client,
)
from selfimprove_jax.language_models.endpoint import Endpoint
from selfimprove_jax.language_models.openai_client import (
  EndpointError,
  Limits,
  Retries,
  Timeouts,
  retry_after_seconds,
)
from selfimprove_jax.language_models.store import CallStore

KEY = "sk-a-very-secret-key-0123456789"


def test_32_calls_run_at_once_and_replies_keep_their_order(server, make_model, ask, says):
  all_there = threading.Barrier(32)

  def behave(call):
    if call.number < 32:
      all_there.wait(20)  # or it breaks, and the call fails
    return says(f"{call.asked}!", wait=0.002 * (int(call.asked) % 5))

  server.behave = behave
  timeouts = Timeouts(connect=30.0, read=30.0, total=30.0)
  model = make_model(limits=Limits(max_concurrent=32), timeouts=timeouts)
  assert isinstance(model, LanguageModel)
  replies = list(model.generate(ask(str(i)) for i in range(128)))
  assert [reply.text for reply in replies] == [f"{i}!" for i in range(128)]
  assert [reply.id for reply in replies] == [str(i) for i in range(128)]
  assert server.most_at_once == 32


def test_read_ahead_is_bounded(make_model, ask):
  taken = []

  def endless():
    while True:
      taken.append(len(taken))
      yield ask(str(len(taken)))

  replies = make_model(limits=Limits(max_concurrent=2)).generate(endless())
  assert [next(replies).text for _ in range(3)] == ["1!", "2!", "3!"]
  assert len(taken) <= 3 + 8
  replies.close()


def test_bodies_follow_the_openai_api(server, make_model, ask):
  model = make_model(extra_body={"top_k": 5})
  options = {"temperature": 0.5, "top_p": 0.9, "stop": ["\n"], "seed": 7}
  list(model.generate([ask("a", **options), TextRequest(prompt="b", max_tokens=3)]))
  chat, bare = sorted(server.calls, key=lambda call: call.path)
  assert chat.path == "/v1/chat/completions" and bare.path == "/v1/completions"
  seed = chat.body.pop("seed")
  assert 0 <= seed < 2**31
  assert chat.body == {
    "model": "some-model",
    "max_tokens": 100,
    "temperature": 0.5,
    "top_p": 0.9,
    "stop": ["\n"],
    "top_k": 5,
    "messages": [{"role": "user", "content": "a"}],
  }
  assert (bare.body["prompt"], bare.body["max_tokens"]) == ("b", 3)
  assert "authorization" not in chat.headers


def test_optional_parameters_are_sent_only_if_they_are_set(server, make_model, ask):
  model = make_model(max_tokens_field="max_completion_tokens")
  options = dict(top_k=5, presence_penalty=0.5, stop_ids=[7], min_tokens=2, top_logprobs=3)
  ids = TextRequest(prompt=[1, 2], max_tokens=3, top_logprobs=0)
  list(model.generate([ask("a", **options), ids]))
  chat, bare = sorted(server.calls, key=lambda call: call.path)
  common = {"model": "some-model", "temperature": 1.0, "top_p": 1.0}
  assert bare.body == common | {"prompt": [1, 2], "max_completion_tokens": 3, "logprobs": 0}
  assert chat.body == common | {
    "max_completion_tokens": 100,
    "messages": [{"role": "user", "content": "a"}],
    "top_k": 5,
    "presence_penalty": 0.5,
    "stop_token_ids": [7],
    "min_tokens": 2,
    "logprobs": True,
    "top_logprobs": 3,
  }


def test_log_probabilities_are_read_and_stored_in_both_forms(server, make_model, ask, says, said):
  chat = {"content": [{"token": "a", "logprob": -0.5, "top_logprobs": [
    {"token": "b", "logprob": -0.25}, {"token": "a", "logprob": -0.5}
  ]}]}  # fmt: skip
  bare = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5, "b": -0.25}]}
  answer = says("a").body

  def behave(call):
    [choice] = answer["choices"]
    found = chat if "messages" in call.body else bare
    return said(answer | {"choices": [choice | {"logprobs": found}]})

  server.behave = behave
  model = make_model()
  asked = [ask(top_logprobs=2), TextRequest(prompt="x", max_tokens=1, top_logprobs=2)]
  for _ in range(2):  # the second time from the store
    replies = list(model.generate(asked))
    expected = (TokenLogprob("a", -0.5, (("b", -0.25), ("a", -0.5))),)
    assert [reply.logprobs for reply in replies] == [expected, expected]
  assert len(server.calls) == 2 and replies[0].cached and replies[0].tokens is None
  [without] = model.generate([ask("b", top_logprobs=None)])
  assert without.logprobs is None


class Echo:
  """A server whose tokens are pairs of characters; it echoes prompts with log-probabilities.

  The log-probability of a token is -1 / 8 for each character before it. It is the most likely one
  unless it contains an "x".
  """

  def __init__(self, says, said, *, bos: str = "", samples: bool = True):
    self._says, self._said, self._bos, self._samples = says, said, bos, samples

  def __call__(self, call):
    prompt = call.body["prompt"]
    if not isinstance(prompt, str):
      prompt = "".join(map(chr, prompt))
    assert call.body["echo"] and call.body["logprobs"] == 1 and call.body["max_tokens"] == 1
    tokens = [self._bos] if self._bos else []
    tokens += [prompt[i : i + 2] for i in range(0, len(prompt), 2)]
    num_prompt = len(tokens)
    tokens += ["!!"] if self._samples else []
    offsets = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    values = [None, *(-offset / 8 for offset in offsets[1:])]
    tops = [None] + [
      {token: value} | ({"zz": value / 2} if "x" in token else {})
      for token, value in zip(tokens[1:], values[1:])
    ]
    body = self._says(prompt, tokens=(num_prompt, len(tokens) - num_prompt)).body
    body["choices"][0]["logprobs"] = {
      "tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets
    }  # fmt: skip
    return self._said(body)


@pytest.mark.parametrize("options", [{}, {"bos": "<s>"}, {"samples": False}])
def test_scores_are_sums_over_the_echoed_continuation(options, server, make_model, says, said):
  server.behave = Echo(says, said, **options)
  model = make_model()
  requests = [
    ScoreRequest(context="aabb", continuation="ccdd", id="a"),
    ScoreRequest(context="aabbc", continuation="cxd", id="b"),  # "cc" spans the boundary
    ScoreRequest(context="aabb", continuation="cc", id="c"),
  ]
  bos = len(options.get("bos", ""))
  for number in range(2):
    scores = list(model.score(requests))
    assert [score.id for score in scores] == list("abc")
    assert [score.logprob for score in scores] == [
      -(2 * bos + 4 + 6) / 8, -(2 * bos + 4 + 6) / 8, -(bos + 4) / 8
    ]  # fmt: skip
    assert [score.num_tokens for score in scores] == [2, 2, 1]
    assert [score.is_greedy for score in scores] == [True, False, True]
    assert [score.cached for score in scores] == [number > 0] * 3
  assert len(server.calls) == 3 and scores[0].cost_usd > 0


def test_scores_of_token_ids_need_no_offsets(server, make_model, says, said):
  def behave(call):
    ids = call.body["prompt"]
    values = [None, *(-float(i) for i in ids[1:]), -100.0]
    tops = [None, *({"t": value} for value in values[1:])]
    found = {"tokens": [f"t{i}" for i in [*ids, 0]], "token_logprobs": values, "top_logprobs": tops}
    body = says("", tokens=(len(ids), 1)).body
    body["choices"][0]["logprobs"] = found
    return said(body)

  server.behave = behave
  [score] = make_model().score([ScoreRequest(context=[5, 6], continuation=[7, 8])])
  assert (score.logprob, score.num_tokens, score.is_greedy) == (-15.0, 2, True)


def test_scores_that_cannot_be_expressed_fail_alone(server, make_model, says, said, store):
  server.behave = Echo(says, said)
  messages = [{"role": "user", "content": "a"}]
  requests = [
    ScoreRequest(context="", continuation="aa"),
    ScoreRequest(context=messages, continuation="aa"),
    ScoreRequest(context="aa", continuation=[1]),
    ScoreRequest(context="aa", continuation="bb"),
  ]
  empty, chat, mixed, fine = make_model().score(requests)
  assert "empty context" in empty.error and fine.error is None
  assert "two texts" in chat.error and "two texts" in mixed.error
  assert store.totals().uncertain_calls == 0 and len(server.calls) == 1


def test_an_endpoint_without_prompt_logprobs_ends_the_run(server, make_model, says, store):
  model = make_model(limits=Limits(max_concurrent=1))
  requests = (ScoreRequest(context="a", continuation=f"b{i}") for i in range(50))
  with pytest.raises(
    EndpointError, match="scores need an endpoint whose /completions takes `echo`"
  ):
    list(model.score(requests))
  assert len(server.calls) == 1
  assert store.totals().uncertain_calls == 1  # it may be charged


@pytest.mark.parametrize("value", [None, float("nan"), float("-inf"), True, "x", 2**70, 5.0])
def test_a_logprob_of_a_reply_is_a_number_that_json_can_hold(value, server, make_model, says, said):
  body = says("yes").body
  body["choices"][0]["logprobs"] = {"tokens": ["yes"], "token_logprobs": [value]}
  server.behave = lambda call: said(body)
  [reply] = make_model().generate([TextRequest(prompt="a", max_tokens=1, top_logprobs=1)])
  assert "malformed log-probabilities" in reply.error


def test_malformed_logprobs_are_retried_and_then_fail_that_request(server, make_model, says, said):
  body = says("aabb!").body
  body["choices"][0]["logprobs"] = {"tokens": ["aa"] * 11, "token_logprobs": [1.0]}
  server.behave = lambda call: said(body)
  [score] = make_model().score([ScoreRequest(context="aa", continuation="bb")])
  assert "malformed log-probabilities" in score.error and len(server.calls) == 3


def test_samples_of_one_prompt_have_different_seeds(server, make_model, ask):
  model = make_model()
  list(model.generate(ask("a", seed=7, sample=i) for i in range(4)))
  assert len({call.body["seed"] for call in server.calls}) == 4


HALF = {"body": {"choices": [{"message": {"content": "hello"}}]}, "cut": 20}
FAILURES = {
  "500": ({"body": {"error": "oh"}, "status": 500}, "500 Internal Server Error"),
  "429": ({"body": {"error": "slow"}, "status": 429}, "429 Too Many Requests"),
  "half a JSON": ({"body": b'{"choices": [{"mess'}, "invalid JSON"),
  "no object": ({"body": [1]}, "JSON that is not an object"),
  "closed stream": (HALF, "broke the connection off"),
  "empty choices": ({"body": {"choices": []}}, "an answer without a text: no choices"),
  "no message": ({"body": {"choices": [{}]}}, "an answer without a text"),
  "error in place of an answer": ({"body": {"error": {"message": "oh"}}}, "oh"),
  "nothing for a minute": ({"body": b"", "wait": 0.6}, "sent nothing for 0.3 s"),
}
SOON = Timeouts(connect=5.0, read=0.3, total=10.0)  # a minute, for tests


@pytest.mark.parametrize("name", FAILURES)
def test_a_transient_failure_is_retried(name, server, make_model, ask, says, said):
  options, _ = FAILURES[name]
  server.behave = lambda call: said(**options) if call.number == 0 else says("well")
  model = make_model(timeouts=SOON) if "wait" in options else make_model()
  [reply] = model.generate([ask()])
  assert (reply.text, reply.error, len(server.calls)) == ("well", None, 2)


@pytest.mark.parametrize("name", FAILURES)
def test_a_lasting_failure_fails_alone_after_bounded_attempts(
  name, server, make_model, ask, says, said
):
  options, message = FAILURES[name]
  server.behave = lambda call: said(**options) if call.asked == "bad" else says("well")
  model = make_model(timeouts=SOON) if "wait" in options else make_model()
  replies = list(model.generate([ask("a"), ask("bad"), ask("c")]))
  assert [reply.text for reply in replies] == ["well", "", "well"]
  assert [reply.finish_reason for reply in replies] == ["stop", "error", "stop"]
  assert message in replies[1].error and "(after 3 attempts)" in replies[1].error
  assert sum(call.asked == "bad" for call in server.calls) == 3


def test_a_slow_answer_is_cut_off_at_the_total_timeout(server, make_model, ask, says):
  server.behave = lambda call: says("late", wait=0.25)
  [reply] = make_model(timeouts=Timeouts(connect=1.0, read=5.0, total=0.1)).generate([ask()])
  assert "took longer than 0.1 s" in reply.error


def test_an_unreachable_endpoint_is_reported_and_not_billed(make_model, store, ask):
  model = make_model()
  gone = Endpoint(
    "http://127.0.0.1:9/v1", "m", store=store, prices=model.api.prices, api_key_env=None,
    retries=Retries(max_attempts=2, initial_seconds=0.01),
  )  # fmt: skip
  with contextlib.closing(gone):
    [reply] = gone.generate([ask()])
  assert "can't be reached" in reply.error
  assert store.totals().uncertain_usd == 0  # nothing can have been billed


def test_a_refused_request_fails_alone_without_retries(server, make_model, ask, says, said):
  refusal = said({"error": {"message": "too long a prompt"}}, status=400)
  server.behave = lambda call: refusal if call.asked == "bad" else says("well")
  replies = list(make_model().generate([ask("bad"), ask("b")]))
  assert "too long a prompt" in replies[0].error and replies[1].error is None
  assert len(server.calls) == 2


@pytest.mark.parametrize(
  ("status", "message"),
  [
    (401, "the key in SOME_KEY is refused"),
    (403, "the key in SOME_KEY is refused"),
    (402, "no money left"),
    (404, "knows no such model"),
  ],
)
def test_a_failure_of_every_request_stops_the_run(
  status, message, server, make_model, ask, said, monkeypatch
):
  monkeypatch.setenv("SOME_KEY", KEY)
  server.behave = lambda call: said({"error": f"no: {KEY}"}, status=status)
  model = make_model(api_key_env="SOME_KEY", limits=Limits(max_concurrent=1))
  with pytest.raises(EndpointError) as error:
    list(model.generate(ask(str(i)) for i in range(50)))
  assert message in str(error.value) and KEY not in str(error.value)
  assert len(server.calls) == 1
  assert server.calls[0].headers["authorization"] == f"Bearer {KEY}"


def test_an_empty_account_stops_the_run(server, make_model, ask, said):
  server.behave = lambda call: said({"error": {"code": "insufficient_quota"}}, status=429)
  with pytest.raises(EndpointError, match="no money left"):
    list(make_model().generate([ask()]))
  assert len(server.calls) == 1


def test_many_failures_in_a_row_end_the_run(server, make_model, ask, said):
  server.behave = lambda call: said({"error": "down"}, status=500)
  retries = Retries(max_attempts=2, initial_seconds=0.001, max_failures_in_a_row=5)
  model = make_model(retries=retries, limits=Limits(max_concurrent=1))
  replies = model.generate(ask(str(i)) for i in range(1000))
  with pytest.raises(EndpointError, match="5 requests failed one after another"):
    list(replies)
  assert 10 <= len(server.calls) <= 20


def test_every_request_waits_for_retry_after(server, make_model, ask, says, said):
  busy = said({}, status=429, headers={"Retry-After": "0.3"})
  server.behave = lambda call: busy if call.number == 0 else says("well")
  model = make_model(limits=Limits(max_concurrent=1))
  assert [reply.text for reply in model.generate(ask(str(i)) for i in range(3))] == ["well"] * 3
  assert server.calls[1].time - server.calls[0].time >= 0.3


@pytest.mark.parametrize("status", [200, 400, 401, 500])
@pytest.mark.parametrize("charset", ["utf-8", "rot13", "no-such"])
def test_an_escaped_key_is_never_shown(status, charset, server, make_model, ask, said, monkeypatch):
  monkeypatch.setenv("SOME_KEY", KEY)
  escaped = "".join(f"\\u{ord(character):04x}" for character in KEY)
  body = ('{"error": "no: ' + escaped + '"}').encode()
  headers = {"Content-Type": f"application/json; charset={charset}"}
  server.behave = lambda call: said(body, status=status, headers=headers)
  model = make_model(api_key_env="SOME_KEY")
  try:
    message = next(model.generate([ask()])).error
  except EndpointError as error:
    message = str(error)
  assert message and KEY not in message and escaped not in message


def test_a_retry_after_of_days_ends_the_run_at_once(server, make_model, ask, says, said):
  busy = said({}, status=429, headers={"Retry-After": "1e6"})
  server.behave = lambda call: busy if call.asked == "1" else says("well", wait=0.05)
  model = make_model(limits=Limits(max_concurrent=2))
  with pytest.raises(EndpointError, match="asks to wait 1000000 s"):
    list(model.generate(ask(str(i)) for i in range(9)))


@pytest.mark.parametrize("content", [5, {"a": 1}, [{"text": 3}], [[1]], True])
def test_content_that_is_no_text_fails_alone(content, server, make_model, ask, says):
  server.behave = lambda call: says(content if call.asked == "bad" else "well")
  bad, good = make_model().generate([ask("bad"), ask("b")])
  assert bad.text == "" and "no text" in bad.error and good.text == "well"


@pytest.mark.parametrize(
  ("content", "text"),
  [([{"text": None}, {"text": "a"}, {"type": "image"}], "a"), (["a", "b"], "ab"), ("\ud800", "?")],
)
def test_parts_and_broken_characters_become_text(content, text, server, make_model, ask, says):
  server.behave = lambda call: says(content)
  [reply] = make_model().generate([ask("a")])
  assert (reply.text, reply.error) == (text, None)


@pytest.mark.parametrize("tokens", [(2**62, 1), (1, 1e30), (-1, 5)])
def test_an_impossible_usage_is_estimated(tokens, server, make_model, ask, says):
  server.behave = lambda call: says("well", tokens=tokens)
  [reply] = make_model().generate([ask("a")])
  assert reply.text == "well" and reply.usage.estimated and reply.error is None


def test_retry_after_is_seconds_or_a_date():
  now = 1_700_000_000.0
  date = email.utils.formatdate(now + 42, usegmt=True)
  assert retry_after_seconds({"retry-after": "1.5"}, now=now) == 1.5
  assert retry_after_seconds({"retry-after": date}, now=now) == 42
  past = email.utils.formatdate(now - 42, usegmt=True)
  assert retry_after_seconds({"retry-after": past}, now=now) == 0
  assert retry_after_seconds({"retry-after-ms": "20", "retry-after": "1"}, now=now) == 0.02
  assert retry_after_seconds({"retry-after": "soon"}, now=now) is None
  assert retry_after_seconds({}, now=now) is None


def test_a_retry_after_of_hours_ends_the_run(server, make_model, ask, said):
  server.behave = lambda call: said({}, status=429, headers={"Retry-After": "7200"})
  with pytest.raises(EndpointError, match="asks to wait 7200 s"):
    list(make_model().generate([ask()]))


def test_backoff_grows_to_its_limit_with_full_jitter():
  retries = Retries(initial_seconds=1.0, max_seconds=8.0)
  for attempt, most in [(1, 1), (2, 2), (4, 8), (9, 8)]:
    waits = [retries.seconds(attempt) for _ in range(300)]
    assert 0 <= min(waits) < 0.1 * most and 0.9 * most < max(waits) <= most


def test_a_refusal_and_a_filtered_reply_are_errors_and_asked_again_by_a_later_run(
  server, make_model, ask, says, said
):
  message = {"role": "assistant", "content": None, "refusal": "I won't."}
  refusal = said({"choices": [{"message": message, "finish_reason": "stop"}]}, wait=0.3)
  filtered = says("half a", reason="content_filter", wait=0.3)
  server.behave = lambda call: refusal if call.asked == "a" else filtered
  model = make_model()
  for run in (1, 2):
    replies = list(model.generate([ask("a"), ask("b"), ask("a")]))
    assert replies[0].error == replies[2].error == "the model refuses: I won't."
    assert "content filter" in replies[1].error and replies[1].text == "half a"
    assert len(server.calls) == 2 * run  # within a run the identical requests share one call
  server.behave = lambda call: says("yes")
  assert [reply.text for reply in model.generate([ask("a"), ask("b")])] == ["yes", "yes"]


def test_the_key_is_in_no_file_log_error_or_reply(
  server, make_model, ask, says, said, monkeypatch, tmp_path, caplog
):
  monkeypatch.setenv("SOME_KEY", KEY)
  caplog.set_level(logging.DEBUG)
  server.behave = lambda call: {
    "echo": says(f"you said {call.headers['authorization']}"),
    "bad": said({"error": f"wrong key {KEY}"}, status=400),
    "down": said({"error": f"wrong key {KEY}"}, status=500),
  }[call.asked]
  model = make_model(api_key_env="SOME_KEY")
  replies = list(model.generate(map(ask, ["echo", "bad", "down"])))
  assert replies[0].text == "you said Bearer [key]"
  assert "wrong key [key]" in replies[1].error and "wrong key [key]" in replies[2].error
  assert server.calls[0].headers["authorization"] == f"Bearer {KEY}"
  files = [p for p in pathlib.Path(tmp_path).rglob("*") if p.is_file()]
  assert any(file.stat().st_size for file in files)
  for file in files:
    assert KEY.encode() not in file.read_bytes(), file
  assert caplog.text and KEY not in caplog.text
  assert KEY not in repr(vars(model))


@pytest.mark.parametrize("key", [None, "", "two\nlines", "schl\u00fcssel"])
def test_a_missing_or_broken_key_is_named_by_its_variable(key, make_model, monkeypatch):
  monkeypatch.delenv("SOME_KEY", raising=False)
  if key is not None:
    monkeypatch.setenv("SOME_KEY", key)
  with pytest.raises(ValueError, match="SOME_KEY") as error:
    make_model(api_key_env="SOME_KEY")
  assert not key or key not in str(error.value)


@pytest.mark.parametrize(
  "url", ["https://user:secret@host/v1", "https://host/v1?key=secret", "host/v1", "ftp://host"]
)
def test_a_url_with_a_secret_is_refused_and_not_shown(url, store, make_model):
  with pytest.raises(ValueError, match="base_url must be") as error:
    Endpoint(url, "m", store=store, prices=make_model().api.prices, api_key_env=None)
  assert "secret" not in str(error.value)


def test_a_short_key_is_not_redacted_from_replies(server, make_model, ask, says, monkeypatch):
  monkeypatch.setenv("SOME_KEY", "EMPTY")
  server.behave = lambda call: says("an EMPTY room")
  [reply] = make_model(api_key_env="SOME_KEY").generate([ask()])
  assert reply.text == "an EMPTY room"


def test_a_closed_endpoint_stores_the_call_in_flight(server, make_model, ask, says, store):
  arrived = threading.Event()

  def behave(call):
    arrived.set()
    return says("paid", wait=0.2)

  server.behave = behave
  model = make_model(limits=Limits(max_concurrent=1))
  replies = model.generate(ask(str(i)) for i in range(4))
  thread = threading.Thread(target=_drain, args=(replies,))
  thread.start()
  arrived.wait()
  model.close()
  thread.join()
  assert len(server.calls) == 1  # those that waited were not sent
  assert (store.totals().paid_calls, store.totals().uncertain_calls) == (1, 0)
  assert store.find(model.api.key(ask("0"))).text == "paid"
  with pytest.raises(ValueError, match="closed"):
    list(model.generate([ask()]))


def test_an_abandoned_generator_sends_nothing_more(server, make_model, ask, says, store):
  server.behave = lambda call: says("x", wait=0.1)
  model = make_model(limits=Limits(max_concurrent=2))
  replies = model.generate(ask(str(i)) for i in range(100))
  next(replies)
  while len(server.calls) < 4:
    time.sleep(0.005)
  replies.close()
  time.sleep(0.5)
  assert len(server.calls) <= 6
  # Calls in flight are paid for, and their answers kept.
  assert (store.totals().paid_calls, store.totals().uncertain_calls) == (len(server.calls), 0)


def test_a_shared_call_survives_the_cancellation_of_one_waiter(server, make_model, ask, says):
  server.behave = lambda call: says(call.asked, wait=0.05)
  model = make_model(limits=Limits(max_concurrent=1))
  for _ in range(5):
    asked = [ask(str(i), sample=len(server.calls)) for i in range(4)]
    given_up, kept = model.generate(asked), model.generate(asked)
    next(given_up)
    first = next(kept)
    given_up.close()
    assert [first.text, *(reply.text for reply in kept)] == ["0", "1", "2", "3"]


def test_a_request_during_a_cancellation_makes_its_own_call(make_model, ask):
  model = make_model()

  async def ask_twice():
    given_up = asyncio.create_task(model._reply(ask()))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.sleep(0)
    return await model._reply(ask())

  assert model.start(ask_twice()).result().text == "hello!"


def test_several_threads_share_one_endpoint(server, make_model, ask):
  model = make_model()
  texts: dict[int, list[str]] = {}

  def work(n):
    texts[n] = [reply.text for reply in model.generate(ask(f"{n} {i}") for i in range(20))]

  threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert texts == {n: [f"{n} {i}!" for i in range(20)] for n in range(4)}


def test_the_rate_limit_holds_against_a_real_clock(server, make_model, ask):
  model = make_model(limits=Limits(max_concurrent=8, requests_per_minute=60.0 * 20))
  list(model.generate([ask("first")]))  # opens the connection, so that no arrival is late
  list(model.generate(ask(str(i)) for i in range(30)))
  times = [call.time for call in server.calls[1:]]
  # 20 a second, with a second's worth at the start.
  assert times[-1] - times[0] >= 0.45
  assert max(sum(start <= t < start + 0.5 for t in times) for start in times) <= 20 + 10 + 1


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"max_repairs": -1}, "max_repairs is -1"),
    ({"extra_body": {"stream": True}}, "extra_body sets"),
  ],
)
def test_impossible_settings_are_refused(options, message, make_model):
  with pytest.raises(ValueError, match=message):
    make_model(**options)


def test_only_the_store_is_written(server, make_model, ask, tmp_path):
  list(make_model().generate([ask()]))
  assert {os.path.splitext(p.name)[0] for p in tmp_path.iterdir()} == {"calls"}
  with pytest.raises(ValueError, match="object store"):
    CallStore("gs://bucket/calls.sqlite", max_usd=None)


def _drain(replies):
  with contextlib.suppress(BaseException):
    list(replies)


def test_a_body_is_bounded_and_comes_uncompressed(server, make_model, ask, said, says, monkeypatch):
  bomb = gzip.compress(b" " * 50_000_000)
  server.behave = lambda call: {
    "bomb": said(bomb, headers={"Content-Encoding": "gzip"}),
    "error": said(bomb, status=400, headers={"Content-Encoding": "gzip"}),
    "long": said(b" " * 200_000),
    "well": says("yes"),
  }[call.asked]
  monkeypatch.setattr(openai_client, "_MAX_BODY_BYTES", 100_000)
  model = make_model()
  tracemalloc.start()
  replies = list(model.generate(map(ask, ["bomb", "error", "long", "well"])))
  assert tracemalloc.get_traced_memory()[1] < 20_000_000
  tracemalloc.stop()
  assert all("compressed (gzip)" in reply.error for reply in replies[:2])
  assert "a body of more than 100000 bytes" in replies[2].error
  assert replies[3].text == "yes"
  assert {call.headers["accept-encoding"] for call in server.calls} == {"identity"}


@pytest.mark.parametrize("tokens", [(True, 5), (10, False), (10, 2**40), (1.5, 2), ("1", 2)])
def test_a_usage_that_is_no_number_is_estimated(tokens, server, make_model, ask, says):
  server.behave = lambda call: says("yes", tokens=tokens)
  [reply] = make_model().generate([ask()])
  assert reply.usage.estimated and reply.error is None
