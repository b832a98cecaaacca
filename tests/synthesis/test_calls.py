import contextlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from selfimprove_jax.synthesis import calls
from selfimprove_jax.synthesis.units import BudgetConfig

# Also the program of the processes that are killed: units, and a model that writes down its calls.
_PROGRAM = """
import collections, dataclasses, itertools, sys
from selfimprove_jax.language_models.protocol import Reply, TextRequest, Usage
from selfimprove_jax.synthesis import calls
from selfimprove_jax.synthesis.units import Unit

def unit(number):
  return Unit("d", "rephrase/easy", sample=number)

def make_request(unit, attempt):
  return TextRequest(prompt="p", max_tokens=9, id=unit.id, sample=unit.sample + 1000 * attempt)

def read(unit, request, reply, attempt):
  begin = {"id": unit.id, "sample": unit.sample}
  if reply.error is not None:
    return {**begin, "failure": {"reason": reply.error, "attempts": attempt + 1, "raw": ""}}
  usage = {"prompt_tokens": reply.usage.prompt_tokens, "completion_tokens": 2}
  return {**begin, "text": reply.text, "usage": usage}

class Model:
  name = "counting"

  def __init__(self, log=None, look_ahead=4, failing=lambda number, attempt: False, after=None):
    self.look_ahead, self.failing, self.after = look_ahead, failing, after
    self.log = log
    self.asked, self.most_ahead, self.num_calls = [], 0, 0

  def generate(self, requests):
    requests, pending = iter(requests), collections.deque()
    self.num_calls += 1
    while True:
      pending.extend(itertools.islice(requests, self.look_ahead - len(pending)))
      if not pending:
        return
      self.most_ahead = max(self.most_ahead, len(pending))
      request = pending.popleft()
      attempt, number = divmod(request.sample, 1000)
      if self.after is not None and len(self.asked) >= self.after:
        raise ConnectionError("the endpoint is down")
      self.asked.append((number, attempt))
      if self.log is not None:
        print(number, attempt, file=self.log, flush=True)
        sys.stdin.readline()  # until the test lets it answer
      if self.failing(number, attempt):
        yield dataclasses.replace(Reply.failed(request, "no"), cost_usd=0.25)
      else:
        text = f"text {request.sample}"
        yield Reply(id=request.id, text=text, finish_reason="stop", usage=Usage(3, 2), cost_usd=0.5)

  def score(self, requests):
    raise NotImplementedError

  def close(self):
    pass

def answer(numbers, model, path, max_attempts=3, **more):
  units = map(unit, numbers)
  return calls.answer(
    units, model=model, make_request=make_request, read=read, log_path=path,
    max_attempts=max_attempts, **more
  )

def seldom(number, attempt):
  return number % 5 == 2 and attempt < number % 4  # 7 fails thrice, 2 twice, 17 once, 12 never
"""
_NAMES: dict = {}
exec(_PROGRAM, _NAMES)
unit, Model, answer, seldom = (_NAMES[name] for name in ("unit", "Model", "answer", "seldom"))


def _samples(path):
  return [(r["sample"], r.get("text")) for r in calls.read_records(path)]


def test_records_are_written_in_the_order_of_units(tmp_path):
  model = Model()
  counts = answer(range(30), model, tmp_path / "log")
  assert _samples(tmp_path / "log") == [(i, f"text {i}") for i in range(30)]
  assert counts == calls.Counts(
    num_records=30, prompt_tokens=90, completion_tokens=60, cost_usd=15.0, num_calls=30
  )
  again = answer(range(30), model, tmp_path / "log")
  assert len(model.asked) == 30 and again.num_skipped == 30 and again.num_calls == 0
  assert again.num_records == 30 and again.cost_usd == 15.0


def test_no_units_are_no_calls_and_no_records(tmp_path):
  assert answer([], Model(), tmp_path / "log") == calls.Counts()
  assert list(calls.read_records(tmp_path / "log")) == []
  assert list(calls.read_records(tmp_path / "none")) == []
  assert calls.retry_failures(tmp_path / "none") == 0


def test_failures_are_asked_again_after_the_others_and_end(tmp_path):
  model = Model(failing=seldom)
  replies = []
  counts = answer(
    range(20), model, tmp_path / "log", on_reply=lambda reply, record: replies.append(record)
  )
  written = list(calls.read_records(tmp_path / "log"))
  firsts = [i for i in range(20) if i not in (2, 7, 17)]
  assert [record["sample"] for record in written] == [*firsts, 17, 2, 7]
  assert [record["text"] for record in written[-3:-1]] == ["text 1017", "text 2002"]
  assert written[-1]["failure"] == {"reason": "no", "attempts": 3, "raw": ""}
  assert [record["cost_usd"] for record in written[-4:]] == [0.5, 0.75, 1.0, 0.75]
  assert counts.num_failures == 1 and counts.num_records == 20 and model.num_calls == 3
  assert counts.cost_usd == 17 * 0.5 + 0.75 + 1.0 + 0.75
  assert counts.num_calls == len(replies) == 25 and replies.count(None) == 5


def test_all_units_may_fail(tmp_path):
  model = Model(failing=lambda number, attempt: True)
  counts = answer(range(10), model, tmp_path / "log", max_attempts=2)
  assert (counts.num_failures, counts.num_records, len(model.asked)) == (10, 10, 20)
  assert answer(range(10), model, tmp_path / "log").num_calls == 0


def test_only_failures_are_asked_again_on_request(tmp_path):
  answer(range(20), Model(failing=seldom), tmp_path / "log", max_attempts=1)
  before = dict(_samples(tmp_path / "log"))
  assert calls.retry_failures(tmp_path / "log") == 3
  assert calls.retry_failures(tmp_path / "log") == 0
  model = Model()
  answer(range(20), model, tmp_path / "log")
  assert sorted(model.asked) == [(2, 0), (7, 0), (17, 0)]
  after = dict(_samples(tmp_path / "log"))
  assert after == before | {i: f"text {i}" for i in (2, 7, 17)}


def test_a_unit_that_occurs_twice_is_asked_once(tmp_path):
  model = Model()
  counts = answer([1, 2, 1, 1], model, tmp_path / "log")
  assert counts.num_records == 2 and counts.num_skipped == 0
  assert answer([1, 2, 1], model, tmp_path / "log").num_records == len(model.asked) == 2


def test_units_are_read_as_the_model_needs_them(tmp_path):
  taken = []
  model = Model(look_ahead=8, after=20)
  with pytest.raises(ConnectionError):
    answer((taken.append(i) or i for i in itertools.count()), model, tmp_path / "log")
  assert len(taken) == 28 and len(_samples(tmp_path / "log")) == 20


def test_a_request_is_made_for_missing_units_alone_and_the_model_still_reads_ahead(tmp_path):
  answer(range(50), Model(), tmp_path / "log")
  made, model = [], Model(look_ahead=8)

  def make_request(unit, attempt):
    made.append(unit.sample)
    return _NAMES["make_request"](unit, attempt)

  calls.answer(
    map(unit, range(100)),
    model=model,
    make_request=make_request,
    read=_NAMES["read"],
    log_path=tmp_path / "log",
    max_attempts=3,
  )
  assert made == list(range(50, 100)) and model.most_ahead == 8 and model.num_calls == 1


def test_an_endpoint_that_dies_leaves_what_it_answered(tmp_path):
  asked = []
  for _ in range(30):
    model = Model(failing=seldom, after=7)
    try:
      answer(range(20), model, tmp_path / "log")
    except ConnectionError:
      asked += model.asked
    else:
      break
  answer(range(20), Model(failing=seldom), tmp_path / "whole")
  assert (tmp_path / "log").read_bytes() == (tmp_path / "whole").read_bytes()
  assert len(asked) > 7


def test_the_bytes_are_the_same_however_often_the_process_is_killed(tmp_path):
  answer(range(40), Model(failing=seldom), tmp_path / "whole")
  whole = (tmp_path / "whole").read_bytes()
  code = _PROGRAM + "\nanswer(range(40), Model(log=sys.stdout, failing=seldom), sys.argv[1])"
  path, recorded, num_killed = tmp_path / "log", set(), 0
  for num_calls in (1, 9, 1, 14, 18, 3, 8, 100):
    process = subprocess.Popen(
      [sys.executable, "-c", code, str(path)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    asked: list[int] = []
    for line in process.stdout:
      asked.append(int(line.split()[0]))
      if len(asked) == num_calls:
        process.send_signal(signal.SIGKILL)
        num_killed += 1
        break
      process.stdin.write("\n")
      process.stdin.flush()
    process.communicate()
    assert not set(asked) & recorded
    recorded = {record["sample"] for record in calls.read_records(path)}
    if num_calls == 14:
      with path.open("ab") as file:  # a line that was being written
        file.write(whole.splitlines()[len(recorded)][:20])
  assert num_killed == 7 and process.returncode == 0
  assert path.read_bytes() == whole


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_torn_last_line_is_cut_and_asked_again(cut, tmp_path):
  answer(range(5), Model(), tmp_path / "log")
  whole = (tmp_path / "log").read_bytes()
  (tmp_path / "log").write_bytes(whole[:-cut])
  model = Model()
  answer(range(5), model, tmp_path / "log")
  assert model.asked == [(4, 0)] and (tmp_path / "log").read_bytes() == whole


@pytest.mark.parametrize("line", ["{", "[]", '{"id": 3}', '{"id": "a"}', "[" * 100_000, "\0\0"])
def test_a_damaged_line_is_named(line, tmp_path):
  answer(range(2), Model(), tmp_path / "log")
  with (tmp_path / "log").open("a") as file:
    file.write(line + "\n")
  with pytest.raises(ValueError, match=r"log, line 3, is not a record"):
    answer(range(5), Model(), tmp_path / "log")


@pytest.mark.parametrize(
  ("budget", "number"),
  [({"max_tokens": 11}, 6), ({"max_usd": 4.0}, 8), ({"max_tokens": 11, "max_usd": 1.0}, 2)],
)
def test_a_budget_ends_at_the_same_record_however_often_it_starts(budget, number, tmp_path):
  budget = BudgetConfig(**budget)
  counts = answer(range(30), Model(), tmp_path / "once", budget=budget)
  assert counts.num_records == number and counts.is_spent
  for after in (1, 2, 30):
    model = Model(after=after, look_ahead=3)
    with contextlib.suppress(ConnectionError):
      answer(itertools.count(), model, tmp_path / "log", budget=budget)
  assert (tmp_path / "log").read_bytes() == (tmp_path / "once").read_bytes()
  assert answer(range(30), Model(), tmp_path / "log", budget=budget).num_calls == 0


def test_a_spent_budget_asks_no_failed_unit_again(tmp_path):
  model = Model(failing=lambda number, attempt: number == 0)
  counts = answer(range(9), model, tmp_path / "log", budget=BudgetConfig(max_tokens=4))
  assert [sample for sample, _ in _samples(tmp_path / "log")] == [1, 2]
  assert counts.num_calls == 3 and counts.is_spent


def test_fewer_than_one_attempt_is_refused(tmp_path):
  with pytest.raises(ValueError, match="max_attempts is 0"):
    answer([1], Model(), tmp_path / "log", max_attempts=0)


def test_a_log_of_a_hundred_thousand_units_is_read_quickly(tmp_path):
  path, every = tmp_path / "log", [unit(i) for i in range(100_001)]
  rest = json.dumps({"text": "a" * 1500, "usage": {"prompt_tokens": 1, "completion_tokens": 1}})
  with path.open("w") as file:
    file.writelines(f'{{"id": "{one.id}", {rest[1:]}\n' for one in every[:-1])
  model = Model()
  before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
  counts = calls.answer(
    every,
    model=model,
    make_request=_NAMES["make_request"],
    read=_NAMES["read"],
    log_path=path,
    max_attempts=1,
  )
  assert time.monotonic() - began < 10
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
  assert counts.num_skipped == 100_000 and len(model.asked) == 1


def test_a_log_in_an_object_store_continues(bucket):
  where = bucket / "log"
  with pytest.raises(ConnectionError):
    answer(range(5), Model(after=3), os.fspath(where))
  model = Model()
  answer(range(5), model, os.fspath(where))
  assert model.asked == [(3, 0), (4, 0)]
  assert [sample for sample, _ in _samples(os.fspath(where))] == list(range(5))
