import dataclasses
import functools
import io
import signal

import jax
import numpy as np
import pytest

from selfimprove_jax.data import mixture
from selfimprove_jax.progress import Progress
from selfimprove_jax.training import checkpoint, loop, preemption, train_step
from selfimprove_jax.training.metrics_log import read_metrics

NUM_STEPS = 12
SCHEDULE = loop.Schedule(
  num_steps=NUM_STEPS, board_every=4, evaluate_every=4, checkpoint_every=3, keep=2
)


class _PoisonedMixture(mixture.Mixture):
  """Its batch of index 7 holds a token that the vocabulary lacks."""

  def batch(self, step):
    batch = super().batch(step)
    if step == 7:
      batch["tokens"] = np.full_like(batch["tokens"], 10_000)
    return batch


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
  """The runs of this module are of one model: their step is traced and compiled once."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_step, "make_train_step", functools.cache(train_step.make_train_step))
    yield


@pytest.fixture
def train(make_setup, source, one_device_mesh):
  """Trains in a folder; keyword arguments replace what differs."""
  setup = make_setup()

  def make(folder, *, schedule=SCHEDULE, kind=mixture.Mixture, **changes):
    rows = [mixture.Component("unique", source, 1.0, True)]
    arguments = dict(
      folder=folder,
      model=setup.model,
      tx=setup.tx,
      learning_rate=setup.learning_rate,
      mesh=one_device_mesh,
      mixture=kind(rows, batch_size=4, num_steps=schedule.num_steps, seed=0),
      schedule=schedule,
      seed=0,
      evaluate=_norm,
      label="test",
      progress=Progress(stream=io.StringIO()),
    )
    return loop.train(**(arguments | changes))

  return make


def _norm(params):
  """Stands in for a held-out loss: any number that depends on the parameters."""
  return float(sum(np.abs(x).sum(dtype=np.float64) for x in jax.tree.leaves(params)))


class _Scripted:
  """Evaluations that give what is written, and remember the parameters they were given."""

  def __init__(self, losses):
    self.losses = iter(losses)
    self.seen = []

  def __call__(self, params):
    self.seen.append(jax.tree.map(lambda x: np.array(x, copy=True), params))
    return next(self.losses)


def _stop_at(monkeypatch, num_steps):
  """Lets SIGTERM seem to come in the given step of the next run."""
  steps = iter(range(1, 1000))
  monkeypatch.setattr(preemption, "requested", lambda _: next(steps) == num_steps)


def _assert_same(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Filled by the first test that needs a whole run: its folder and result."""
  return tmp_path_factory.mktemp("finished"), []


@pytest.fixture
def uninterrupted(train, finished):
  folder, results = finished
  if not results:
    results.append(train(folder))
  return folder, results[0]


def test_every_step_is_in_the_metrics_and_evaluations_where_the_schedule_has_them(uninterrupted):
  folder, result = uninterrupted
  records = read_metrics(folder / "metrics.jsonl")
  assert records == result.curve
  trained = [r for r in records if "train/loss" in r]
  assert [r["step"] for r in trained] == list(range(1, NUM_STEPS + 1))
  assert set(trained[0]) == {
    "step",
    "train/loss",
    "train/grad_norm",
    "train/tokens",
    "train/learning_rate",
  }
  assert [r["step"] for r in records if "validation/loss" in r] == [0, 4, 8, 12]
  assert trained[0]["train/loss"] == pytest.approx(np.log(32), abs=0.3)
  assert records[-1]["validation/loss"] == _norm(result.params)
  assert (result.step, result.steps_made) == (NUM_STEPS, NUM_STEPS)


def test_the_last_checkpoints_stay(uninterrupted):
  folder, _ = uninterrupted
  assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["12", "9"]


def test_a_finished_run_does_nothing_when_run_again(uninterrupted, train):
  folder, result = uninterrupted

  def files():
    return {
      path: path.read_bytes()
      for path in folder.rglob("*")
      if path.is_file() and "tensorboard" not in path.parts
    }

  before = files()
  again = train(folder, evaluate=_Scripted([]))
  assert files() == before
  _assert_same(again.params, result.params)
  assert dataclasses.replace(again, params=None) == dataclasses.replace(result, params=None)


def test_sigterm_saves_and_leaves_with_143_and_the_run_goes_on_as_if_nothing_had_been(
  uninterrupted, train, tmp_path, monkeypatch
):
  folder, result = uninterrupted
  for stop in (1, 4, 2):  # counted from where the run goes on: in steps 1, 5 and 7
    _stop_at(monkeypatch, stop)
    with pytest.raises(preemption.Preempted) as raised:
      train(tmp_path)
    assert raised.value.code == 143
  assert "stopped at step 7, state saved" in raised.value.message
  assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == 7
  monkeypatch.setattr(preemption, "requested", lambda _: False)
  resumed = train(tmp_path)
  _assert_same(resumed.params, result.params)
  assert resumed.curve == result.curve
  assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_the_step_is_compiled_once_for_a_fresh_state_and_once_for_a_restored_one(
  train, tmp_path, monkeypatch
):
  jit_train_step, jitted = train_step.jit_train_step, []

  def recorded(*args, **options):
    jitted.append(jit_train_step(*args, **options))
    return jitted[-1]

  monkeypatch.setattr(train_step, "jit_train_step", recorded)
  # Not the one that the runs of this module share.
  monkeypatch.setattr(train_step, "make_train_step", train_step.make_train_step.__wrapped__)
  with monkeypatch.context() as patch, pytest.raises(preemption.Preempted):
    _stop_at(patch, 5)
    train(tmp_path)
  train(tmp_path)
  assert [step._cache_size() for step in jitted] == [1, 1]


def test_a_damaged_last_checkpoint_costs_the_steps_since_the_one_before(
  uninterrupted, train, tmp_path, monkeypatch, caplog
):
  folder, result = uninterrupted
  _stop_at(monkeypatch, 8)
  with pytest.raises(preemption.Preempted):
    train(tmp_path)
  metadata = tmp_path / "checkpoints" / "8" / "checksums" / "metadata"
  metadata.write_bytes(metadata.read_bytes()[:-5])
  monkeypatch.setattr(preemption, "requested", lambda _: False)
  resumed = train(tmp_path)
  assert "going back to the checkpoint before it" in caplog.text
  _assert_same(resumed.params, result.params)
  assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
  train, tmp_path, make_setup, one_device_mesh
):
  message = r"test: step 8 has loss nan .* good checkpoint is of step 6\. Lower the learning rate"
  for _ in range(2):  # to run it again changes nothing
    with pytest.raises(loop.LossIsNotFiniteError, match=message):
      train(tmp_path, kind=_PoisonedMixture)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[-1]["step"] == 7
    assert all(np.isfinite(list(r.values())).all() for r in records)
  with checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
    assert checkpoints.steps() == [3, 6]
    restored = checkpoints.restore_last(make_setup().abstract(one_device_mesh))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(restored.params))


def test_a_loss_that_is_not_finite_in_a_step_that_saves_is_not_saved(train, tmp_path):
  schedule = dataclasses.replace(SCHEDULE, checkpoint_every=8, evaluate_every=NUM_STEPS)
  with pytest.raises(loop.LossIsNotFiniteError, match="good checkpoint is of step None"):
    train(tmp_path, schedule=schedule, kind=_PoisonedMixture)
  assert not list((tmp_path / "checkpoints").iterdir())


PATIENT = dataclasses.replace(
  SCHEDULE, evaluate_every=1, checkpoint_every=NUM_STEPS, keep=1, patience=3
)
# The best is of step 2; after three that are no better the run stops, at step 5.
LOSSES = [9.0, 5.0, 3.0, 4.0, 3.0, 3.5]


def test_early_stopping_gives_the_best_parameters(train, tmp_path):
  evaluate = _Scripted(LOSSES)
  result = train(tmp_path, schedule=PATIENT, evaluate=evaluate)
  assert (result.step, result.steps_made) == (2, 5)
  assert [r["validation/loss"] for r in result.curve if "validation/loss" in r] == LOSSES
  _assert_same(result.params, evaluate.seen[2])
  again = train(tmp_path, schedule=PATIENT, evaluate=_Scripted([]))
  assert (again.step, again.steps_made) == (2, 5)
  _assert_same(again.params, result.params)
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "5"]


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_early_stopping_is_the_same_after_a_resume(train, tmp_path, monkeypatch, stop):
  before, after = _Scripted(LOSSES[: stop + 1]), _Scripted(LOSSES[stop + 1 :])
  _stop_at(monkeypatch, stop)
  with pytest.raises(preemption.Preempted):
    train(tmp_path, schedule=PATIENT, evaluate=before)
  result = train(tmp_path, schedule=PATIENT, evaluate=after)
  assert (result.step, result.steps_made) == (2, 5)
  assert [r["validation/loss"] for r in result.curve if "validation/loss" in r] == LOSSES
  _assert_same(result.params, (before.seen + after.seen)[2])


def test_a_run_begins_from_the_parameters_it_is_given_and_leaves_them_alive(
  train, tmp_path, make_setup, one_device_mesh
):
  first = make_setup().state(one_device_mesh, seed=5).params
  one_step = dataclasses.replace(SCHEDULE, num_steps=1)  # the rate of the first step is 0
  result = train(tmp_path, schedule=one_step, initial_params=first)
  _assert_same(result.params, first)


def test_a_run_killed_in_a_step_and_in_a_save_ends_as_the_uninterrupted_one(tmp_path, start_job):
  whole, killed = tmp_path / "whole", tmp_path / "killed"

  def saving():
    return list((killed / "checkpoints").glob("*orbax-checkpoint-tmp*"))

  uninterrupted = start_job(whole)

  job = start_job(killed)
  job.wait_until(lambda: job.num_steps() > 8)  # in some step after the seventh
  job.kill()

  job = start_job(killed)
  reached = job.num_steps()
  job.wait_until(lambda: job.num_steps() > reached and saving())
  job.kill()
  assert saving(), "it was killed after the save, not in it"

  job = start_job(killed)
  reached = job.num_steps()
  job.wait_until(lambda: job.num_steps() > reached)
  job.processes[0].terminate()
  assert job.end() == [128 + signal.SIGTERM]

  assert start_job(killed).end() == uninterrupted.end() == [0]
  assert (killed / "result.json").read_bytes() == (whole / "result.json").read_bytes()
  assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
  assert not saving()
