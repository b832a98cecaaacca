import dataclasses
import functools
import io
import signal

import jax
import numpy as np
import pytest

from selfimprove_jax.data import mixture
from selfimprove_jax.runtime import preemption
from selfimprove_jax.runtime.progress import Progress
from selfimprove_jax.training import checkpoint, loop, train_step
from selfimprove_jax.training.config import TrainingConfig
from selfimprove_jax.training.metrics_log import read_metrics

NUM_STEPS = 12
# Evaluations at steps 4, 8 and 12, checkpoints at 3, 6, 9 and 12.
TRAINING = TrainingConfig(
  batch_rows=4,
  peak_lr=1e-2,
  final_lr=1e-3,
  eps=1e-3,
  num_evaluations=3,
  num_checkpoints=4,
  keep=2,
  board_every=4,
)


class _PoisonedMixture(mixture.Mixture):
  """The batch of one step holds a token outside the vocabulary."""

  poisoned_step = 8

  def batch(self, step):
    batch = super().batch(step)
    if step == self.poisoned_step - 1:
      batch["tokens"] = np.full_like(batch["tokens"], 10_000)
    return batch


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
  """Lets the runs of this module, which have the same model, share traced and compiled steps."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_step, "make_train_step", functools.cache(train_step.make_train_step))
    learning_rate = functools.cache(TRAINING.learning_rate)
    make_optimizer = functools.cache(TRAINING.make_optimizer)
    patch.setattr(TrainingConfig, "learning_rate", lambda _, num_steps: learning_rate(num_steps))
    patch.setattr(
      TrainingConfig, "make_optimizer", lambda _, *args, **options: make_optimizer(*args, **options)
    )
    yield


@pytest.fixture(scope="module")
def setup(make_setup):
  return make_setup()


@pytest.fixture
def train(setup, source, one_device_mesh):
  """Trains in a folder; keyword arguments replace the defaults."""

  def make(folder, *, num_steps=NUM_STEPS, kind=mixture.Mixture, **changes):
    rows = [mixture.Component("unique", source, 1.0, True)]
    arguments = dict(
      folder=folder,
      model=setup.model,
      loss=setup.loss,
      mesh=one_device_mesh,
      training=TRAINING,
      num_steps=num_steps,
      weight_decay=0.1,
      mixture=kind(rows, batch_size=4, num_steps=num_steps, seed=0),
      seed=0,
      evaluate=_norm,
      label="test",
      progress=Progress(stream=io.StringIO()),
    )
    return loop.train(**(arguments | changes))

  return make


def _optimizer():
  return TRAINING.make_optimizer(TRAINING.learning_rate(NUM_STEPS), weight_decay=0.1)


def _norm(params):
  """Replaces a held-out loss: a number that depends on the parameters."""
  return float(sum(np.abs(x).sum(dtype=np.float64) for x in jax.tree.leaves(params)))


class _Scripted:
  """Returns given losses one by one, and keeps the parameters it was called with."""

  def __init__(self, losses):
    self.losses = iter(losses)
    self.seen = []

  def __call__(self, params):
    self.seen.append(jax.tree.map(lambda x: np.array(x, copy=True), params))
    return next(self.losses)


def _stop_at(monkeypatch, num_steps):
  """Simulates SIGTERM in the given step of the next run."""
  steps = iter(range(1, 1000))
  monkeypatch.setattr(preemption, "requested", lambda _: next(steps) == num_steps)


def _assert_same(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The folder and result of a whole run, which the first test that needs it makes."""
  return tmp_path_factory.mktemp("finished"), []


@pytest.fixture
def uninterrupted(train, finished):
  folder, results = finished
  if not results:
    results.append(train(folder))
  return folder, results[0]


def test_metrics_have_every_step_and_the_evaluations_of_the_schedule(uninterrupted):
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


def test_a_finished_run_changes_nothing_when_run_again(uninterrupted, train):
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


def test_sigterm_saves_and_exits_with_143_and_the_resumed_run_is_the_same(
  uninterrupted, train, tmp_path, monkeypatch
):
  folder, result = uninterrupted
  for stop in (1, 4, 2, 4):  # counted from where the run resumes: in steps 1, 5, 7 and 11
    _stop_at(monkeypatch, stop)
    with pytest.raises(preemption.Preempted) as raised:
      train(tmp_path)
    assert raised.value.code == 143
  assert "stopped at step 11, state saved" in raised.value.message
  assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == 11
  monkeypatch.setattr(preemption, "requested", lambda _: False)
  resumed = train(tmp_path)
  _assert_same(resumed.params, result.params)
  assert resumed.curve == result.curve
  assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
  for run in (folder, tmp_path):
    assert sorted(int(p.name) for p in (run / "checkpoints").iterdir()) == [9, 12]


def test_a_fresh_and_a_resumed_run_compile_the_step_once_each(train, tmp_path, monkeypatch):
  # Without the cache that the runs of this module share.
  make_train_step, jitted = train_step.make_train_step.__wrapped__, []

  def recorded(*args, **options):
    jitted.append(make_train_step(*args, **options))
    return jitted[-1]

  monkeypatch.setattr(train_step, "make_train_step", recorded)
  with monkeypatch.context() as patch, pytest.raises(preemption.Preempted):
    _stop_at(patch, 5)
    train(tmp_path)
  train(tmp_path)
  assert [step._cache_size() for step in jitted] == [1, 1]


def test_after_a_damaged_last_checkpoint_the_one_before_is_used(
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


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_a_good_checkpoint(
  train, tmp_path, setup, one_device_mesh
):
  message = r"test: step 8 has loss nan .* good checkpoint is of step 6\. Lower the learning rate"
  for _ in range(2):  # running it again changes nothing
    with pytest.raises(loop.LossIsNotFiniteError, match=message):
      train(tmp_path, kind=_PoisonedMixture)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[-1]["step"] == 7
    assert all(np.isfinite(list(r.values())).all() for r in records)
  with checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
    assert checkpoints.steps() == [3, 6]
    restored = checkpoints.restore_last(
      train_step.abstract_state(setup.model, _optimizer(), one_device_mesh)
    )
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(restored.params))


def test_a_loss_that_is_not_finite_in_a_step_that_saves_is_not_saved(train, tmp_path):
  class PoisonedSave(_PoisonedMixture):
    poisoned_step = 6

  training = dataclasses.replace(TRAINING, num_checkpoints=2, num_evaluations=1)
  assert training.checkpoint_every(NUM_STEPS) == PoisonedSave.poisoned_step
  with pytest.raises(loop.LossIsNotFiniteError, match="good checkpoint is of step None"):
    train(tmp_path, training=training, kind=PoisonedSave)
  assert not list((tmp_path / "checkpoints").iterdir())


PATIENT = dataclasses.replace(
  TRAINING, num_evaluations=NUM_STEPS, num_checkpoints=1, keep=1, patience=3
)
# Step 2 is the best; after three that are no better the run stops, at step 5.
LOSSES = [9.0, 5.0, 3.0, 4.0, 3.0, 3.5]


def test_early_stopping_gives_the_best_parameters(train, tmp_path):
  evaluate = _Scripted(LOSSES)
  result = train(tmp_path, training=PATIENT, evaluate=evaluate)
  assert (result.step, result.steps_made) == (2, 5)
  assert [r["validation/loss"] for r in result.curve if "validation/loss" in r] == LOSSES
  _assert_same(result.params, evaluate.seen[2])
  again = train(tmp_path, training=PATIENT, evaluate=_Scripted([]))
  assert (again.step, again.steps_made) == (2, 5)
  _assert_same(again.params, result.params)
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "5"]


def test_training_that_only_makes_the_loss_higher_gives_the_parameters_of_its_start(
  train, tmp_path, monkeypatch
):
  losses = [3.0, 5.0, 4.0, 3.5]
  evaluate = _Scripted(losses)
  result = train(tmp_path / "whole", training=PATIENT, evaluate=evaluate)
  assert (result.step, result.steps_made) == (0, 3)
  _assert_same(result.params, evaluate.seen[0])
  _stop_at(monkeypatch, 2)
  with pytest.raises(preemption.Preempted):
    train(tmp_path / "stopped", training=PATIENT, evaluate=_Scripted(losses[:3]))
  resumed = train(tmp_path / "stopped", training=PATIENT, evaluate=_Scripted(losses[3:]))
  assert (resumed.step, resumed.curve) == (0, result.curve)
  _assert_same(resumed.params, result.params)


def test_a_run_stops_at_the_loss_it_is_asked_for(train, tmp_path):
  goal = dataclasses.replace(TRAINING, num_evaluations=NUM_STEPS, stop_at_loss=3.0)
  evaluate = _Scripted([9.0, 5.0, 2.9])
  result = train(tmp_path, training=goal, evaluate=evaluate)
  assert (result.step, result.steps_made) == (2, 2)
  _assert_same(result.params, evaluate.seen[2])
  again = train(tmp_path, training=goal, evaluate=_Scripted([]))
  assert (again.step, again.steps_made) == (2, 2)


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_early_stopping_is_the_same_after_a_resume(train, tmp_path, monkeypatch, stop):
  before, after = _Scripted(LOSSES[: stop + 1]), _Scripted(LOSSES[stop + 1 :])
  _stop_at(monkeypatch, stop)
  with pytest.raises(preemption.Preempted):
    train(tmp_path, training=PATIENT, evaluate=before)
  result = train(tmp_path, training=PATIENT, evaluate=after)
  assert (result.step, result.steps_made) == (2, 5)
  assert [r["validation/loss"] for r in result.curve if "validation/loss" in r] == LOSSES
  _assert_same(result.params, (before.seen + after.seen)[2])


def test_a_run_starts_from_given_parameters_and_does_not_donate_them(
  train, tmp_path, setup, one_device_mesh, monkeypatch
):
  first = setup.state(one_device_mesh, seed=5).params
  _stop_at(monkeypatch, 1)
  with pytest.raises(preemption.Preempted):
    train(tmp_path, initial_params=first)
  with checkpoint.Checkpoints(tmp_path / "checkpoints", keep=None) as checkpoints:
    saved = checkpoints.restore_params(1, setup.abstract(one_device_mesh).params)
  _assert_same(saved, first)  # the learning rate of the first step is 0


@pytest.mark.slow
def test_a_run_killed_in_a_step_and_in_a_save_ends_the_same(tmp_path, start_job):
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
