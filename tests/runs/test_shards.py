"""The loop over shards: resuming, stopping early, and dealing shards out to several processes."""

import itertools
import os
import pathlib
import subprocess
import sys
import threading
import types

import portpicker
import pytest

from selfimprove_jax.runs import artifacts, shards
from selfimprove_jax.runs.shards import ShardLoop
from selfimprove_jax.runtime import distributed, preemption


def _records(index):
  return [{"id": f"{index}-{i}", "tokens": index + i} for i in range(2)]


def _count(record):
  return {"tokens": record["tokens"]}


def _loop(folder, num_shards=6, *, scratch=None, **options):
  writer = artifacts.Writer(folder, config={}, inputs={}, scratch=scratch)
  return writer, ShardLoop(writer, num_shards, label="toy", count=_count, **options)


def _make(folder, *, on_open=lambda: None, **options):
  """Makes the artifact; returns the indices of the shards that were made now, and the totals."""
  writer, loop = _loop(folder, **options)
  on_open()
  made = []
  for index in loop:
    loop.write_jsonl(index, _records(index))
    made.append(index)
  writer.finish(dict(loop.totals))
  return made, loop.totals


def _bytes(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def _enough(totals):
  return totals["tokens"] >= 9


def test_every_shard_is_made_and_counted_in_the_manifest(tmp_path):
  made, totals = _make(tmp_path, num_shards=3)
  assert made == [0, 1, 2]
  assert totals == {"records": 6, "tokens": 1 + 3 + 5}
  artifact = artifacts.open_artifact(tmp_path)
  assert list(artifact.shards) == [artifacts.shard_name(i, 3) for i in range(3)]
  assert artifact.shards[artifacts.shard_name(2, 3)]["tokens"] == 5
  assert artifact.summary == totals


def test_the_loop_ends_with_the_shard_that_makes_enough(tmp_path):
  made, totals = _make(tmp_path, enough=_enough)
  assert made == [0, 1, 2]
  assert totals["tokens"] == 9
  assert sorted(artifacts.open_artifact(tmp_path).shards) == [f"0000{i}.jsonl" for i in range(3)]


def test_shards_of_an_earlier_run_are_counted_and_not_made_again(tmp_path):
  whole, rest = tmp_path / "whole", tmp_path / "rest"
  _make(whole)
  _, loop = _loop(rest)
  for index in itertools.islice(loop, 2):
    loop.write_jsonl(index, _records(index))  # the second is written, but was not listed yet
  shown = []
  made, totals = _make(rest, on_made_elsewhere=lambda counts: shown.append(counts["tokens"]))
  assert made == [2, 3, 4, 5]
  assert shown == [1, 3]
  assert totals["records"] == 12
  assert _bytes(rest) == _bytes(whole)


def test_a_damaged_shard_is_made_again(tmp_path):
  whole, rest = tmp_path / "whole", tmp_path / "rest"
  _make(whole)
  _, loop = _loop(rest)
  for index in itertools.islice(loop, 4):
    loop.write_jsonl(index, _records(index))
  (rest / artifacts.shard_name(1, 6)).write_text("damaged")
  made, _ = _make(rest)
  assert made == [1, 4, 5]
  assert _bytes(rest) == _bytes(whole)


def test_upcoming_gives_the_indices_that_the_loop_will_yield(tmp_path):
  _, loop = _loop(tmp_path)
  loop.write_jsonl(2, _records(2))
  assert list(loop.upcoming()) == [0, 1, 3, 4, 5]


def test_sigterm_ends_the_loop_between_shards_and_whole_ones_stay(tmp_path, monkeypatch):
  _, loop = _loop(tmp_path)
  with pytest.raises(preemption.Preempted, match="143") as stop:
    for index in loop:
      loop.write_jsonl(index, _records(index))
      if index == 1:
        monkeypatch.setattr(preemption, "requested", lambda step: True)
  assert stop.value.message == "toy: stopped, whole shards are kept"
  with pytest.raises(preemption.Preempted):
    loop.check_preemption()
  monkeypatch.undo()
  loop.check_preemption()
  assert _make(tmp_path)[0] == [2, 3, 4, 5]


class _Job:
  """Threads in the roles of the processes of a job."""

  def __init__(self, num_processes):
    self._num_processes = num_processes
    self._barrier = threading.Barrier(num_processes, timeout=20)
    self._local = threading.local()
    self._value = None

  def wait(self):
    self._barrier.wait()

  def patch(self, monkeypatch):
    roles = types.SimpleNamespace(
      process_index=lambda: self._local.index, process_count=lambda: self._num_processes
    )
    monkeypatch.setattr(shards, "jax", roles)
    monkeypatch.setattr(distributed, "barrier", lambda name: self.wait())
    monkeypatch.setattr(distributed, "from_main", self._from_main)
    monkeypatch.setattr(distributed, "is_main", lambda: self._local.index == 0)
    monkeypatch.setattr(preemption, "requested", lambda step: False)

  def _from_main(self, make):
    if self._local.index == 0:
      self._value = make()
    self._barrier.wait()
    value = self._value
    self._barrier.wait()
    return value

  def run(self, function):
    results = {}

    def work(index):
      self._local.index = index
      try:
        results[index] = function(index)
      except BaseException as error:
        results[index] = error
        self._barrier.abort()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(self._num_processes)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    # The others only say that the barrier is broken.
    for error in results.values():
      if isinstance(error, BaseException) and not isinstance(error, threading.BrokenBarrierError):
        raise error
    return [results[index] for index in range(self._num_processes)]


@pytest.mark.parametrize("num_processes", [2, 4])
@pytest.mark.parametrize("enough", [None, _enough])
def test_the_bytes_are_the_same_for_any_number_of_processes(
  tmp_path, monkeypatch, num_processes, enough
):
  _, expected = _make(tmp_path / "one", num_shards=7, enough=enough)
  folder = tmp_path / "several"
  artifacts.Writer(folder, config={}, inputs={})
  job = _Job(num_processes)
  job.patch(monkeypatch)

  def work(index):
    scratch = tmp_path / f"scratch-{index}" if index else None
    # As in `stage`: a writer that is opened removes what killed processes left.
    return _make(folder, num_shards=7, enough=enough, scratch=scratch, on_open=job.wait)

  results = job.run(work)
  made = [indices for indices, _ in results]
  for index, indices in enumerate(made):
    assert all(i % num_processes == index for i in indices)
  assert sorted(itertools.chain(*made))[: 3 if enough else 7] == list(range(3 if enough else 7))
  assert [totals for _, totals in results] == [expected] * num_processes
  assert _bytes(folder) == _bytes(tmp_path / "one")


def test_a_loop_alone_makes_every_shard_in_a_job_of_several_processes(tmp_path, monkeypatch):
  job = _Job(2)
  job.patch(monkeypatch)
  results = job.run(lambda index: _make(tmp_path, alone=True) if index == 0 else None)
  assert results[0][0] == list(range(6))


_PROCESS = """
import sys
from selfimprove_jax.runs import runner, storage
from selfimprove_jax.runtime import distributed
from selfimprove_jax.runtime.progress import Progress
from tests.runs import toy

folder, index, count, port = sys.argv[1:]
if count != "1":
  distributed.initialize(
    coordinator=f"127.0.0.1:{port}", num_processes=int(count), process_id=int(index),
    connect_seconds=60, heartbeat_seconds=60, hang_seconds=60,
  )
stages = [
  toy.stage("a"),
  toy.stage("b", "a", changes={"function": toy.write_shards, "uses_devices": True}),
  toy.stage("c", "b"),
]
runner.run(stages, storage.path(folder), progress=Progress(quiet=True), config={})
"""


def _run_job(folder, num_processes):
  repo = pathlib.Path(__file__).parents[2]
  port = portpicker.pick_unused_port()
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", _PROCESS, str(folder), str(i), str(num_processes), str(port)],
      env={**os.environ, "PYTHONPATH": str(repo)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(num_processes)
  ]
  outputs = [process.communicate(timeout=180)[0] for process in processes]
  assert [process.returncode for process in processes] == [0] * num_processes, outputs


@pytest.mark.slow
def test_a_job_of_two_processes_writes_the_bytes_of_one(tmp_path):
  for count in (1, 2):
    _run_job(tmp_path / str(count), count)
  one, two = (
    {
      path.relative_to(tmp_path / count).as_posix(): path.read_bytes()
      for path in (tmp_path / count).rglob("*")
      if path.is_file() and path.name not in (".lock", "timings.jsonl")
    }
    for count in ("1", "2")
  )
  assert one == two
  assert artifacts.open_artifact(tmp_path / "2" / "c").summary == {"total": 1 + 42}
