"""The training loop: restore, then for each step: update, log, evaluate, save."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from selfimprove_jax.data.mixture import Mixture
from selfimprove_jax.models.llama import Llama
from selfimprove_jax.runs import storage
from selfimprove_jax.runtime import distributed, hardware, partitioning, preemption
from selfimprove_jax.runtime.progress import Bar, Progress
from selfimprove_jax.training import train_step
from selfimprove_jax.training.checkpoint import Checkpoints
from selfimprove_jax.training.config import TrainingConfig
from selfimprove_jax.training.losses import Loss
from selfimprove_jax.training.metrics_log import MetricsLog
from selfimprove_jax.training.speed import Clock
from selfimprove_jax.training.train_step import Metrics, TrainState

_MAX_SKIPPED_IN_A_ROW = 20


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """The result of a run.

  Attributes:
    step: the step of the resulting parameters: the last one, or with patience the best one, which
      is 0 if training only made the loss higher.
    params: its parameters.
    steps_made: updates computed, which is the cost of the run.
    curve: the records of `metrics.jsonl`.
  """

  step: int
  params: Any
  steps_made: int
  curve: list[dict[str, Any]]


class LossIsNotFiniteError(FloatingPointError):
  """The loss or gradient became infinite or NaN, or step after step was skipped as a spike."""


def train(
  *,
  folder: storage.Path,
  model: Llama,
  loss: Loss,
  mesh: Mesh,
  training: TrainingConfig,
  num_steps: int,
  weight_decay: float,
  mixture: Mixture,
  evaluate: Callable[[Any], float] | None,
  seed: int,
  label: str,
  progress: Progress,
  initial_params: Any = None,
) -> TrainResult:
  """Trains in a folder, or continues the training there.

  A run that was interrupted anywhere and started again ends with the same parameters and the same
  `metrics.jsonl`, bit for bit on the same devices: the data and the dropout of a step depend on its
  number alone, and the checkpoint holds everything else.

  Args:
    evaluate: maps parameters to the validation loss; None trains without one.
    initial_params: start from these instead of from `seed`.

  Raises:
    LossIsNotFiniteError: training diverged; the last sound checkpoint stays.
    preemption.Preempted: SIGTERM came; the state is saved.
  """
  init_key, dropout_key = jax.random.split(jax.random.key(seed))
  learning_rate = training.learning_rate(num_steps)
  tx = training.make_optimizer(learning_rate, weight_decay=weight_decay)
  jitted = train_step.make_train_step(
    loss, model, tx, learning_rate, mesh, accumulation_steps=training.accumulation_steps
  )

  def step_fn(state: TrainState, batch: train_step.Batch) -> tuple[TrainState, Metrics]:
    with jax.set_mesh(mesh):
      return jitted(state, batch, dropout_key)

  abstract = train_step.abstract_state(model, tx, mesh)
  is_regular = functools.partial(training.saves_at, num_steps=num_steps)
  with Checkpoints(
    folder / "checkpoints", keep=training.keep, is_regular=is_regular
  ) as checkpoints:
    state = checkpoints.restore_last(abstract)
    if state is None:
      state = train_step.init_state(model, tx, mesh, key=init_key, params=initial_params)
    start = int(state.step)
    seq_len = mixture.components[0].source.seq_len
    clock = Clock(
      step_tokens=mixture.batch_size * seq_len,
      flops_per_token=model.c.train_flops_per_token(seq_len),
      peak=hardware.peak(list(mesh.devices.flat), model.c.dtype),
    )
    with distributed.main_first("metrics"):
      log = MetricsLog(folder, from_step=start, writes=distributed.is_main())
    with contextlib.closing(log):
      run = _Run(training, num_steps, checkpoints, log, clock, evaluate, label)
      bar = progress.track(num_steps, label=label, unit="steps", start=start)
      batches = mixture.iterate(start, num_steps=num_steps - start)
      with contextlib.closing(batches), bar as shown, distributed.watched(label) as run.beat:
        for_step = (partitioning.global_batch(batch, mesh) for _, batch in batches)
        state = run.steps(state, step_fn, for_step, shown)
      run.save(state)
      checkpoints.wait()
      if line := clock.line():
        progress.note(f"{label}: {line}")
      step = int(state.step)
      best = step if training.patience is None else run.best_step()
      params = state.params
      if best != step:
        params = checkpoints.restore_params(best, abstract.params)
      return TrainResult(best, params, step, log.records)


@dataclasses.dataclass
class _Run:
  """Evaluates, saves, logs and checks around the steps of one run."""

  training: TrainingConfig
  num_steps: int
  checkpoints: Checkpoints
  log: MetricsLog
  clock: Clock
  validation_loss: Callable[[Any], float] | None
  label: str
  beat: Callable[[], None] = lambda: None
  skipped_in_a_row: int = 0

  def steps(self, state: TrainState, step_fn: Any, batches: Any, bar: Bar) -> TrainState:
    """Makes the steps that are left; returns the state after the last or the stopping one."""
    evaluate_every = self.training.evaluate_every(self.num_steps)
    start = int(state.step)
    if start == 0:
      if not self.log.records:
        self.evaluate(0, state)
      if self.training.patience is not None:
        self.save(state)  # training may make it worse: then these parameters are the result
    if self.stops_early():
      return state
    waiting = None  # metrics of the step before, still on the device
    for step in range(start + 1, self.num_steps + 1):
      with self.clock.lost_to("data"):
        batch = next(batches)
      with self.clock.lost_to("compile") if step == start + 1 else contextlib.nullcontext():
        state, metrics = step_fn(state, batch)
      # Metrics are fetched one step late, so that the devices always have the next step to do.
      if waiting is not None:
        self.fetch(waiting, step - 1)
      waiting = metrics
      evaluates = step == self.num_steps or step % evaluate_every == 0
      saves = self.training.saves_at(step, self.num_steps)
      preempted = preemption.requested(step)
      if evaluates or saves or preempted:
        # A state is saved only after its step was checked.
        self.fetch(waiting, step)
        waiting = None
      self.clock.step_done()
      if evaluates:
        self.evaluate(step, state)
      if saves:
        self.save(state)
      if evaluates and self.stops_early():
        break
      if preempted:
        self.save(state)
        self.checkpoints.wait()
        raise preemption.Preempted(f"{self.label}: stopped at step {step}, state saved")
      self.show(step, bar)
    return state

  def evaluate(self, step: int, state: TrainState) -> None:
    if self.validation_loss is None:
      return
    with self.clock.lost_to("evaluation"):
      self.log.write(step, {"validation/loss": self.validation_loss(state.params)})
    self.beat()

  def show(self, step: int, bar: Bar) -> None:
    shown = {} if self.log.last_loss is None else {"loss": self.log.last_loss}
    if step % self.training.board_every == 0:
      speed = self.clock.summary(last_steps=self.training.board_every)
      self.log.write_speed(step, speed)
      shown["tokens_per_second"] = speed["tokens_per_second"]
      if speed["mfu"] is not None:
        shown["mfu"] = speed["mfu"]
    bar.update(1, **shown)

  def fetch(self, metrics: Metrics, step: int) -> None:
    """Waits for a step's metrics, checks and logs them."""
    values = {f"train/{name}": float(value) for name, value in metrics.items()}
    self.beat()
    self.check(values, step)
    self.log.write(step, values, board=step % self.training.board_every == 0)

  def check(self, values: dict[str, float], step: int) -> None:
    """Raises LossIsNotFiniteError for a step with bad numbers that was not skipped."""
    before = next((r for r in reversed(self.log.records) if "train/loss" in r), {})
    if values.get("train/skipped", 0.0) > before.get("train/skipped", 0.0):
      self.skipped_in_a_row += 1
      if self.skipped_in_a_row <= _MAX_SKIPPED_IN_A_ROW:
        return
      fault = f"is number {self.skipped_in_a_row} in a row to be skipped as a spike"
    else:
      self.skipped_in_a_row = 0
      loss, norm = values["train/loss"], values["train/grad_norm"]
      if math.isfinite(loss) and math.isfinite(norm):
        return
      fault = f"has loss {loss} and gradient norm {norm}"
    self.checkpoints.wait()
    kept = self.checkpoints.steps()
    raise LossIsNotFiniteError(
      f"{self.label}: step {step} {fault}. The last good checkpoint is of step "
      f"{kept[-1] if kept else None}. Lower the learning rate or the clipping norm"
    )

  def save(self, state: TrainState) -> None:
    protect = frozenset() if self.training.patience is None else frozenset([self.best_step()])
    with self.clock.lost_to("checkpoint"):
      # First: a run that resumes from this checkpoint needs the metrics of the steps before it.
      self.log.sync()
      self.checkpoints.save(state, protect=protect)
    self.beat()

  def evaluations(self) -> list[tuple[float, int]]:
    """Returns (loss, step) of every evaluation so far, from earlier attempts too."""
    records = self.log.records
    return [(r["validation/loss"], r["step"]) for r in records if "validation/loss" in r]

  def best_step(self) -> int:
    return min(self.evaluations(), default=(math.inf, 0))[1]

  def stops_early(self) -> bool:
    evaluations = self.evaluations()
    best = min(range(len(evaluations)), key=lambda i: evaluations[i], default=0)
    patience, goal = self.training.patience, self.training.stop_at_loss
    if goal is not None and evaluations and evaluations[best][0] <= goal:
      return True
    return patience is not None and len(evaluations) - 1 - best >= patience
