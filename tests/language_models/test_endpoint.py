import asyncio
import contextlib
import email.utils
import logging
import os
import pathlib
import threading
import time

import pytest

from selfimprove_jax.language_models import LanguageModel, TextRequest
from selfimprove_jax.language_models.endpoint import Endpoint
from selfimprove_jax.language_models.store import CallStore
from selfimprove_jax.language_models.throttle import Limits
from selfimprove_jax.language_models.transport import (
  EndpointError,
  Retries,
  Timeouts,
  retry_after_seconds,
)

KEY = "sk-a-very-secret-key-0123456789"


def test_replies_come_in_the_order_of_the_requests_and_32_at_once(server, make_model, ask, says):
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


def test_requests_are_taken_only_some_way_ahead(make_model, ask):
  taken = []

  def endless():
    while True:
      taken.append(len(taken))
      yield ask(str(len(taken)))

  replies = make_model(limits=Limits(max_concurrent=2)).generate(endless())
  assert [next(replies).text for _ in range(3)] == ["1!", "2!", "3!"]
  assert len(taken) <= 3 + 8
  replies.close()


def test_the_endpoint_is_asked_as_its_interface_says(server, make_model, ask):
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


def test_samples_of_one_prompt_get_seeds_of_their_own(server, make_model, ask):
  model = make_model()
  list(model.generate(ask("a", seed=7, sample=i) for i in range(4)))
  assert len({call.body["seed"] for call in server.calls}) == 4


HALF = {"body": {"choices": [{"message": {"content": "hello"}}]}, "cut": 20}
FAILURES = {
  "500": ({"body": {"error": "oh"}, "status": 500}, "500 Internal Server Error"),
  "429": ({"body": {"error": "slow"}, "status": 429}, "429 Too Many Requests"),
  "half a JSON": ({"body": b'{"choices": [{"mess'}, "no JSON"),
  "no object": ({"body": [1]}, "JSON, but no object"),
  "closed stream": (HALF, "broke the connection off"),
  "empty choices": ({"body": {"choices": []}}, "an answer without a text: no choices"),
  "no message": ({"body": {"choices": [{}]}}, "an answer without a text"),
  "error in place of an answer": ({"body": {"error": {"message": "oh"}}}, "oh"),
  "nothing for a minute": ({"body": b"", "wait": 0.6}, "sent nothing for 0.3 s"),
}
SOON = Timeouts(connect=5.0, read=0.3, total=10.0)  # a minute, for tests


@pytest.mark.parametrize("name", FAILURES)
def test_what_passes_is_tried_again(name, server, make_model, ask, says, said):
  options, _ = FAILURES[name]
  server.behave = lambda call: said(**options) if call.number == 0 else says("well")
  model = make_model(timeouts=SOON) if "wait" in options else make_model()
  [reply] = model.generate([ask()])
  assert (reply.text, reply.error, len(server.calls)) == ("well", None, 2)


@pytest.mark.parametrize("name", FAILURES)
def test_what_does_not_pass_fails_that_request_alone_after_bounded_attempts(
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


def test_an_answer_that_drips_is_cut_off_at_the_total_time(server, make_model, ask, says):
  server.behave = lambda call: says("late", wait=0.25)
  [reply] = make_model(timeouts=Timeouts(connect=1.0, read=5.0, total=0.1)).generate([ask()])
  assert "took longer than 0.1 s" in reply.error


def test_an_endpoint_that_is_not_there_is_said_so(make_model, store, ask):
  model = make_model()
  gone = Endpoint(
    "http://127.0.0.1:9/v1", "m", store=store, prices=model.api.prices, api_key_env=None,
    retries=Retries(max_attempts=2, initial_seconds=0.01),
  )  # fmt: skip
  with contextlib.closing(gone):
    [reply] = gone.generate([ask()])
  assert "can't be reached" in reply.error
  assert store.totals().uncertain_usd == 0  # nothing can have been billed


def test_a_request_that_is_refused_fails_alone_and_at_once(server, make_model, ask, says, said):
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
def test_what_would_fail_every_request_stops_at_once(
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


def test_an_account_without_money_is_not_asked_again(server, make_model, ask, said):
  server.behave = lambda call: said({"error": {"code": "insufficient_quota"}}, status=429)
  with pytest.raises(EndpointError, match="no money left"):
    list(make_model().generate([ask()]))
  assert len(server.calls) == 1


def test_an_endpoint_that_answers_nobody_ends_the_run(server, make_model, ask, said):
  server.behave = lambda call: said({"error": "down"}, status=500)
  retries = Retries(max_attempts=2, initial_seconds=0.001, max_failures_in_a_row=5)
  model = make_model(retries=retries, limits=Limits(max_concurrent=1))
  replies = model.generate(ask(str(i)) for i in range(1000))
  with pytest.raises(EndpointError, match="5 requests failed one after another"):
    list(replies)
  assert 10 <= len(server.calls) <= 20


def test_retry_after_is_waited_for_by_every_request(server, make_model, ask, says, said):
  busy = said({}, status=429, headers={"Retry-After": "0.3"})
  server.behave = lambda call: busy if call.number == 0 else says("well")
  model = make_model(limits=Limits(max_concurrent=1))
  assert [reply.text for reply in model.generate(ask(str(i)) for i in range(3))] == ["well"] * 3
  assert server.calls[1].time - server.calls[0].time >= 0.3


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


def test_an_endpoint_that_asks_for_hours_ends_the_run(server, make_model, ask, said):
  server.behave = lambda call: said({}, status=429, headers={"Retry-After": "7200"})
  with pytest.raises(EndpointError, match="asks to wait 7200 s"):
    list(make_model().generate([ask()]))


def test_back_off_grows_up_to_its_limit_and_is_jittered():
  retries = Retries(initial_seconds=1.0, max_seconds=8.0)
  for attempt, most in [(1, 1), (2, 2), (4, 8), (9, 8)]:
    waits = [retries.seconds(attempt) for _ in range(300)]
    assert 0 <= min(waits) < 0.1 * most and 0.9 * most < max(waits) <= most


def test_a_refusal_and_a_filtered_reply_are_errors_and_kept(server, make_model, ask, says, said):
  message = {"role": "assistant", "content": None, "refusal": "I won't."}
  refusal = said({"choices": [{"message": message, "finish_reason": "stop"}]})
  filtered = says("half a", reason="content_filter")
  server.behave = lambda call: refusal if call.asked == "a" else filtered
  model = make_model()
  for _ in range(2):
    first, second = model.generate([ask("a"), ask("b")])
    assert first.error == "the model refuses: I won't."
    assert "content filter" in second.error and second.text == "half a"
  assert len(server.calls) == 2


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
def test_an_address_with_a_secret_in_it_is_refused_unshown(url, store, make_model):
  with pytest.raises(ValueError, match="base_url must be") as error:
    Endpoint(url, "m", store=store, prices=make_model().api.prices, api_key_env=None)
  assert "secret" not in str(error.value)


def test_a_short_word_for_a_key_is_not_cut_out_of_replies(
  server, make_model, ask, says, monkeypatch
):
  monkeypatch.setenv("SOME_KEY", "EMPTY")
  server.behave = lambda call: says("an EMPTY room")
  [reply] = make_model(api_key_env="SOME_KEY").generate([ask()])
  assert reply.text == "an EMPTY room"


def test_a_closed_endpoint_keeps_what_was_under_way(server, make_model, ask, says, store):
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
  # What was under way is paid for, and kept.
  assert (store.totals().paid_calls, store.totals().uncertain_calls) == (len(server.calls), 0)


def test_what_one_gives_up_another_that_asks_the_same_still_gets(server, make_model, ask, says):
  server.behave = lambda call: says(call.asked, wait=0.05)
  model = make_model(limits=Limits(max_concurrent=1))
  for _ in range(5):
    asked = [ask(str(i), sample=len(server.calls)) for i in range(4)]
    given_up, kept = model.generate(asked), model.generate(asked)
    next(given_up)
    first = next(kept)
    given_up.close()
    assert [first.text, *(reply.text for reply in kept)] == ["0", "1", "2", "3"]


def test_who_asks_while_a_call_is_being_given_up_makes_another(make_model, ask):
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
  list(model.generate(ask(str(i)) for i in range(30)))
  times = [call.time for call in server.calls]
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
def test_settings_that_make_no_sense_are_refused(options, message, make_model):
  with pytest.raises(ValueError, match=message):
    make_model(**options)


def test_nothing_is_written_beside_the_store(server, make_model, ask, tmp_path):
  list(make_model().generate([ask()]))
  assert {os.path.splitext(p.name)[0] for p in tmp_path.iterdir()} == {"calls"}
  with pytest.raises(ValueError, match="object store"):
    CallStore("gs://bucket/calls.sqlite", max_usd=None)


def _drain(replies):
  with contextlib.suppress(BaseException):
    list(replies)
