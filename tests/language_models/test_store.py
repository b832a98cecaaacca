import collections
import concurrent.futures
import dataclasses
import gc
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

import selfimprove_jax.language_models.store as store_module
from selfimprove_jax.language_models import chat_api
from selfimprove_jax.language_models.chat_api import Prices
from selfimprove_jax.language_models.openai_client import Limits
from selfimprove_jax.language_models.protocol import Usage
from selfimprove_jax.language_models.store import (
  Answer,
  BudgetError,
  CallStore,
  InFlightError,
  StoreError,
)

ANSWER = Answer("text", "stop", Usage(10, 5), 0.25)
CHILD = """
import sys
from selfimprove_jax.language_models import TextRequest
from selfimprove_jax.language_models.chat_api import Prices
from selfimprove_jax.language_models.endpoint import Endpoint
from selfimprove_jax.language_models.store import CallStore
from selfimprove_jax.language_models.openai_client import Limits

url, path, num, concurrent = sys.argv[1:]
model = Endpoint(
  url, "some-model", store=CallStore(path, max_usd=None), prices=Prices(1.0, 2.0),
  api_key_env=None, limits=Limits(max_concurrent=int(concurrent)),
)
messages = lambda i: [{"role": "user", "content": str(i)}]
requests = (TextRequest(prompt=messages(i), id=str(i), max_tokens=100) for i in range(int(num)))
for reply in model.generate(requests):
  print(reply.id, flush=True)
"""


def test_a_reopened_store_finds_its_answers(tmp_path):
  store = CallStore(tmp_path / "calls.sqlite", max_usd=1.0)
  call = store.begin("k", model="m", most_usd=0.5)
  assert store.find("k") is None
  assert store.paid(call, ANSWER) == ANSWER
  store.close()
  again = CallStore(tmp_path / "calls.sqlite", max_usd=1.0)
  assert again.find("k") == ANSWER
  totals = again.totals()
  assert (totals.paid_calls, totals.prompt_tokens, totals.completion_tokens) == (1, 10, 5)
  assert (totals.paid_usd, totals.uncertain_usd, totals.estimated_calls) == (0.25, 0.0, 0)
  again.close()


def test_the_first_of_two_answers_is_kept_and_both_are_paid_for(store):
  calls = [store.begin("k", model="m", most_usd=0.5, lease=False) for _ in range(2)]
  store.paid(calls[0], ANSWER)
  assert store.paid(calls[1], Answer("other", "stop", Usage(1, 1), 0.25)).text == "text"
  assert store.totals().paid_usd == 0.5


def test_the_cap_counts_spent_and_reserved_dollars(tmp_path):
  store = CallStore(tmp_path / "calls.sqlite", max_usd=1.0)
  first = store.begin("a", model="m", most_usd=0.6)
  with pytest.raises(BudgetError, match="cap of 1 USD") as error:
    store.begin("b", model="m", most_usd=0.5)
  assert error.value.calls_in_flight
  store.paid(first, ANSWER)
  second = store.begin("b", model="m", most_usd=0.75)
  store.not_billed(second)
  third = store.begin("c", model="m", most_usd=0.75)
  store.lost(third)
  with pytest.raises(BudgetError) as error:
    store.begin("d", model="m", most_usd=1e-9)
  assert not error.value.calls_in_flight
  assert (store.totals().paid_usd, store.totals().uncertain_usd) == (0.25, 0.75)
  store.close()
  # A call of a process that was killed stays too, and a higher cap makes room.
  again = CallStore(tmp_path / "calls.sqlite", max_usd=2.0)
  again.begin("e", model="m", most_usd=1.0)
  again.close()
  killed = CallStore(tmp_path / "calls.sqlite", max_usd=2.0)
  assert killed.totals().uncertain_calls == 2
  with pytest.raises(BudgetError):
    killed.begin("f", model="m", most_usd=0.1)
  killed.close()


def test_sums_of_many_small_prices_are_exact(tmp_path):
  store = CallStore(tmp_path / "calls.sqlite", max_usd=1e-6)
  for _ in range(10):
    store.paid(store.begin("k", model="m", most_usd=1e-7), Answer("", "stop", Usage(1, 0), 1e-7))
  with pytest.raises(BudgetError):
    store.begin("k", model="m", most_usd=1e-9)
  store.close()


def test_a_negative_cap_is_refused(tmp_path):
  with pytest.raises(ValueError, match="max_usd is -1"):
    CallStore(tmp_path / "calls.sqlite", max_usd=-1.0)


def test_many_threads_of_two_stores_never_pass_the_cap(tmp_path):
  stores = [CallStore(tmp_path / "calls.sqlite", max_usd=0.5) for _ in range(2)]
  refused = []

  def work(n):
    try:
      call = stores[n % 2].begin(f"k{n}", model="m", most_usd=0.05)
    except BudgetError:
      refused.append(n)
    else:
      stores[n % 2].paid(call, Answer("t", "stop", Usage(1, 1), 0.05))

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(work, range(40)))
  assert (stores[0].totals().paid_calls, len(refused)) == (10, 30)
  for store in stores:
    store.close()


def test_a_repeated_request_is_paid_for_once(server, make_model, ask, says, store):
  server.behave = lambda call: says("well", wait=0.05)
  model = make_model()
  replies = list(model.generate(ask("same", id=str(i)) for i in range(20)))
  assert [reply.id for reply in replies] == [str(i) for i in range(20)]
  assert len(server.calls) == 1
  assert [reply.cached for reply in replies] == [False] + [True] * 19
  assert {reply.cost_usd for reply in replies} == {20e-6}
  [again] = make_model().generate([ask("same")])
  assert again.cached and again.text == "well" and len(server.calls) == 1
  # Other parameters, another sample, another model: other requests.
  others = [ask("same", sample=1), ask("same", temperature=0.5), ask("same", max_tokens=7)]
  list(model.generate(others))
  list(make_model(identity="another").generate([ask("same")]))
  assert len(server.calls) == 5


@pytest.mark.parametrize("bad", [("no", {"reason": "content_filter"}), ("no", {})])
def test_an_unusable_answer_is_asked_again_and_both_are_paid_for(
  bad, server, make_model, ask, says, store
):
  text, options = bad
  answer = says(text, **options)
  server.behave = lambda call: answer if call.number == 0 else says('{"a": 1}')
  model = make_model(max_repairs=0)
  asked = ask("x", json_schema={"type": "object"})
  [first], [second], [third] = (list(model.generate([asked])) for _ in range(3))
  assert first.error and second.error is None and third.cached
  assert len(server.calls) == store.totals().paid_calls == 2


def test_an_answer_that_cannot_be_stored_is_returned_and_the_run_ends(
  server, make_model, ask, says, tmp_path
):
  store = CallStore(tmp_path / "full.sqlite", max_usd=None)
  model = make_model(store=store, limits=Limits(max_concurrent=1))
  list(model.generate([ask("a")]))
  pages = store._db.execute("PRAGMA page_count").fetchone()[0]
  store._db.execute(f"PRAGMA max_page_count={pages}")
  server.behave = lambda call: says("x" * 100_000)
  replies = model.generate(ask(str(i)) for i in range(9))
  assert len(next(replies).text) == 100_000
  with pytest.raises(StoreError, match=r"full.sqlite: database or disk is full"):
    list(replies)
  assert store.find(model.api.key(ask("a"))).text == "a!"


def test_a_damaged_answer_is_absent_and_is_replaced(store):
  store.add("k", ANSWER, model="m")
  store._db.execute("UPDATE answers SET answer = replace(answer, 'text\"', 'tezt\"')")
  assert store.find("k") is None
  assert store.add("k", ANSWER, model="m") and store.find("k") == ANSWER


def test_a_file_that_is_no_database_is_named(tmp_path):
  (tmp_path / "calls.sqlite").write_bytes(b"x" * 5000)
  with pytest.raises(StoreError, match=r"calls.sqlite: file is not a database"):
    CallStore(tmp_path / "calls.sqlite", max_usd=None)


def test_three_processes_on_one_store_pay_once_for_each_request(server, says, store):
  num = 150
  server.behave = lambda call: says(f"{call.asked}!", wait=0.02)
  command = [sys.executable, "-c", CHILD, server.url, str(store.path), str(num), "8"]
  pipes = {"stdout": subprocess.PIPE, "text": True}
  children = [subprocess.Popen(command, **pipes) for _ in range(3)]
  for child in children:
    said, _ = child.communicate()
    assert said.split() == [str(i) for i in range(num)] and child.returncode == 0
  totals = store.totals()
  assert len(server.calls) == totals.paid_calls == num
  assert totals.uncertain_calls == 0


def test_a_lease_ends_with_its_call_its_store_or_its_process(store, monkeypatch, tmp_path):
  def begin(one):
    return one.begin("k", model="m", most_usd=0.5)

  other = CallStore(store.path, max_usd=None)
  for end in (store.not_billed, store.lost, lambda call: store.paid(call, ANSWER)):
    call = begin(store)
    assert other.is_in_flight("k")
    for one in (store, other):
      with pytest.raises(InFlightError, match=r"call for k is in flight .*calls.sqlite"):
        begin(one)
    end(call)
    assert not other.is_in_flight("k")
  # One whose beats stopped is free after a time, and its end does not free the next one's.
  first, now = begin(store), time.time()
  monkeypatch.setattr(time, "time", lambda: now + 61)
  second = begin(other)
  store.not_billed(first)
  assert store.is_in_flight("k")
  other.not_billed(second)
  code = "import os, sys; from selfimprove_jax.language_models.store import CallStore as S; "
  code += "S(sys.argv[1], max_usd=None).begin('k', model='m', most_usd=0.5); os._exit(1)"
  monkeypatch.undo()
  subprocess.run([sys.executable, "-c", code, str(store.path)])
  assert store._db.execute("SELECT COUNT(*) FROM leases").fetchone() == (1,)
  begin(store)
  other.close()


def test_leases_are_renewed_while_the_store_is_open(tmp_path, monkeypatch):
  monkeypatch.setattr(store_module, "_LEASE_SECONDS", 0.4)
  monkeypatch.setattr(store_module, "_BEAT_SECONDS", 0.05)
  first, second = (CallStore(tmp_path / "calls.sqlite", max_usd=None) for _ in range(2))
  first.begin("k", model="m", most_usd=0.5)
  time.sleep(0.8)
  assert second.is_in_flight("k")
  first.close()
  time.sleep(0.5)
  assert not second.is_in_flight("k")
  second.close()


def test_unusable_answers_are_dropped_unless_another_replaced_them(store):
  store.add("k", ANSWER, model="m")
  store.drop({"k": dataclasses.replace(ANSWER, text="other")})
  assert store.find("k") == ANSWER
  store.drop({"k": ANSWER})
  assert store.find("k") is None


def test_a_failure_of_any_kind_leaves_no_call_open(server, make_model, ask, store, monkeypatch):
  model = make_model()
  monkeypatch.setattr(chat_api.ChatApi, "answer", lambda *args: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    list(model.generate([ask()]))
  assert store._db.execute("SELECT state FROM calls").fetchall() == [("lost",)]
  assert not store.is_in_flight(model.api.key(ask()))


@pytest.mark.parametrize(
  ("damage", "what"),
  [
    ("UPDATE calls SET prompt_tokens = 11 WHERE id = 2", "entry of call 2"),
    ("UPDATE calls SET state = 'qaid' WHERE id = 1", "entry of call 1"),
    ("UPDATE calls SET checksum = NULL WHERE id = 1", "entry of call 1"),
    ("UPDATE total SET cost_nano_usd = 0", "sum of the prices"),
    ("DELETE FROM total", "sum of the prices"),
    ("DELETE FROM calls WHERE id = 2", "sum of the prices"),
  ],
)
def test_a_damaged_ledger_is_refused_by_name(damage, what, store):
  for key in ("a", "b"):
    store.add(key, ANSWER, model="m")
  store._db.execute(damage)
  with pytest.raises(StoreError, match=rf"calls.sqlite: the {what} .*is damaged"):
    CallStore(store.path, max_usd=None)


def test_a_store_that_nobody_closes_keeps_no_connection_open(tmp_path):
  store = CallStore(tmp_path / "calls.sqlite", max_usd=None)
  connection = store._db
  del store
  gc.collect()
  with pytest.raises(sqlite3.ProgrammingError, match="closed"):
    connection.execute("SELECT 1")


def test_a_store_of_an_earlier_version_is_sealed_and_read(tmp_path):
  store = CallStore(tmp_path / "calls.sqlite", max_usd=None)
  store.add("k", ANSWER, model="m")
  for statement in (
    "ALTER TABLE calls DROP COLUMN checksum",
    "UPDATE answers SET answer = substr(answer, 1, instr(answer, char(10)) - 1)",
    "PRAGMA user_version = 0",
  ):
    store._db.execute(statement)
  store.close()
  again = CallStore(tmp_path / "calls.sqlite", max_usd=None)
  assert again.find("k") == ANSWER and again.totals().paid_usd == 0.25
  again.close()


def test_a_flipped_bit_gives_no_wrong_answer(tmp_path):
  store = CallStore(tmp_path / "whole.sqlite", max_usd=None)
  answers = {str(i): dataclasses.replace(ANSWER, text=f"text {i} " * 20) for i in range(30)}
  for key, answer in answers.items():
    store.add(key, answer, model="m")
  totals = store.totals()
  store.close()
  whole = (tmp_path / "whole.sqlite").read_bytes()
  rng, refused, absent = random.Random(0), 0, 0
  for _ in range(100):
    changed = bytearray(whole)
    changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    for path in tmp_path.glob("damaged*"):
      path.unlink()
    (tmp_path / "damaged.sqlite").write_bytes(changed)
    try:
      damaged = CallStore(tmp_path / "damaged.sqlite", max_usd=None)
    except StoreError as error:
      assert "damaged.sqlite: " in str(error)
      refused += 1
      continue
    try:
      for key, answer in answers.items():
        found = damaged.find(key)
        absent += found is None
        assert found in (None, answer)
      assert damaged.totals() == totals
    except StoreError as error:
      assert "damaged.sqlite: " in str(error)
      refused += 1
    finally:
      damaged.close()
  assert refused > 5 and absent > 5


@pytest.mark.slow  # a real process, killed
def test_a_killed_run_loses_no_answer_and_pays_for_none_twice(
  server, make_model, says, store, ask, tmp_path
):
  num, concurrent = 60, 4
  server.behave = lambda call: says(f"{call.asked}!", wait=0.03)
  command = [sys.executable, "-c", CHILD, server.url, str(store.path), str(num), str(concurrent)]
  child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  handed_on = [child.stdout.readline().strip() for _ in range(15)]
  child.send_signal(signal.SIGKILL)
  handed_on += child.stdout.read().split()
  child.wait()
  child.stdout.close()
  assert "" not in handed_on and len(handed_on) < num
  asked_before = {call.asked for call in server.calls}
  kept = store.totals().paid_calls
  assert kept >= len(handed_on)

  replies = list(make_model().generate(ask(str(i)) for i in range(num)))
  assert [reply.text for reply in replies] == [f"{i}!" for i in range(num)]
  counts = collections.Counter(call.asked for call in server.calls)
  twice = {asked for asked, count in counts.items() if count > 1}
  assert not twice & set(handed_on)
  # Only calls in flight when it died can have been paid for unseen, and the ledger says so.
  totals = store.totals()
  assert len(twice) <= totals.uncertain_calls <= concurrent
  assert totals.paid_calls == num and sum(r.cached for r in replies) == kept
  assert twice <= asked_before
  assert totals.paid_usd + totals.uncertain_usd >= len(server.calls) * 20e-6


def test_the_hard_cap_is_never_exceeded_and_paid_answers_are_kept(
  server, make_model, ask, says, tmp_path
):
  # Prompts of 1 token a byte at most and completions of 100 tokens at 2 USD a million.
  server.behave = lambda call: says("x", tokens=(20, 100), wait=0.01)
  store = CallStore(tmp_path / "capped.sqlite", max_usd=0.005)
  model = make_model(store=store, limits=Limits(max_concurrent=32))
  replies = []
  with pytest.raises(BudgetError, match=r"cap of 0.005 USD"):
    for reply in model.generate(ask(str(i)) for i in range(500)):
      replies.append(reply)
  spent = len(server.calls) * 220e-6
  assert 0.004 < spent <= 0.005
  model.close()
  assert store.totals().paid_usd == pytest.approx(spent)
  store.close()
  more = CallStore(tmp_path / "capped.sqlite", max_usd=0.01)
  asked = [call.asked for call in server.calls]
  assert {reply.id for reply in replies} <= set(asked)
  again = make_model(store=more)
  assert all(reply.cached for reply in again.generate(map(ask, asked)))
  assert len(server.calls) == len(asked)
  again.close()
  more.close()


def test_a_call_over_budget_waits_for_calls_in_flight(server, make_model, ask, says, tmp_path):
  server.behave = lambda call: says("x", tokens=(1, 1), wait=0.1)
  store = CallStore(tmp_path / "capped.sqlite", max_usd=0.0003)  # one at a time fits
  model = make_model(store=store)
  assert len(list(model.generate(ask(str(i)) for i in range(5)))) == 5
  assert server.most_at_once == 1
  model.close()
  store.close()


def test_lost_answers_count_at_their_highest_possible_price(
  server, make_model, ask, said, says, store
):
  server.behave = lambda call: {
    "cut": said({"choices": []}),
    "refused": said({}, status=400),
    "busy": said({}, status=429),
    "well": says("y"),
  }[call.asked]
  model = make_model()
  list(model.generate(map(ask, ["cut", "refused", "busy", "well"])))
  totals = store.totals()
  most = model.api.prices.usd(model.api.most_usage(ask("cut")))
  assert totals.uncertain_calls == 3  # as many attempts
  assert totals.uncertain_usd == pytest.approx(3 * most)
  assert (totals.paid_calls, totals.paid_usd) == (1, 20e-6)


def test_tokens_are_estimated_if_the_endpoint_reports_no_usage(
  server, make_model, ask, says, store
):
  server.behave = lambda call: says("eight characters", tokens=None)
  [reply] = make_model(count_tokens=lambda text: len(text.split())).generate([ask("two words")])
  assert reply.usage == Usage(2 + 32, 2, estimated=True)
  assert reply.cost_usd == pytest.approx(38e-6)
  assert store.totals().estimated_calls == 1


def test_the_estimate_excludes_cached_requests_and_duplicates(server, make_model, ask):
  model = make_model(count_tokens=len, prices=Prices(2.0, 10.0))
  list(model.generate([ask("old")]))
  estimate = model.estimate([ask("old"), ask("new"), ask("new"), ask("also")])
  assert (estimate.num_requests, estimate.num_cached) == (4, 2)
  assert estimate.prompt_tokens == 3 + 4 + 2 * 32
  assert estimate.most_completion_tokens == 200
  assert estimate.prompt_usd == pytest.approx(71 * 2e-6)
  assert estimate.most_usd == pytest.approx(71 * 2e-6 + 200 * 10e-6)
  assert len(server.calls) == 1


def test_identical_requests_of_several_threads_share_one_call(server, make_model, ask, says):
  server.behave = lambda call: says("well", wait=0.1)
  model = make_model()
  threads = [threading.Thread(target=lambda: list(model.generate([ask()]))) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(server.calls) == 1
  assert os.path.exists(model.store.path)
