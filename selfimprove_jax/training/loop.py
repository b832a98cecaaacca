"""The training loop: restore, then for each step: update, log, evaluate, save."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from selfimprove_jax import distributed, hardware, partitioning, storage
from selfimprove_jax.data.mixture import Mixture
from selfimprove_jax.models.llama import Llama
from selfimprove_jax.progress import Progress
from selfimprove_jax.training import checkpoint, preemption, train_step
from selfimprove_jax.training.metrics_log import MetricsLog
from selfimprove_jax.training.speed import Clock


@dataclasses.dataclass(frozen=True)
class Schedule:
  """When things happen, in steps.

  Attributes:
    num_steps: updates of the whole run.
    board_every: a point of the TensorBoard curves; `metrics.jsonl` holds every step.
    evaluate_every: also at the end.
    checkpoint_every: also at the end, and when SIGTERM asks.
    keep: checkpoints that stay.
    patience: stop after that many evaluations without a lower loss; None never stops early.
    accumulation_steps: parts that a batch is taken in.
  """

  num_steps: int
  board_every: int
  evaluate_every: int
  checkpoint_every: int
  keep: int
  patience: int | None = None
  accumulation_steps: int = 1


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """What a run ended with.

  Attributes:
    step: the step whose parameters are the result: the last, or, with patience, the best.
    params: its parameters.
    steps_made: updates computed, which is what the run cost.
    curve: the records of `metrics.jsonl`.
  """

  step: int
  params: Any
  steps_made: int
  curve: list[dict[str, Any]]


class LossIsNotFiniteError(FloatingPointError):
  """The loss or the gradient became infinite or NaN, or leapt at every step."""


_MAX_SKIPPED_IN_A_ROW = 20


def train(
  *,
  folder: storage.Path,
  model: Llama,
  tx: optax.GradientTransformation,
  learning_rate: optax.Schedule,
  mesh: Mesh,
  mixture: Mixture,
  schedule: Schedule,
  seed: int,
  evaluate: Callable[[Any], float],
  label: str,
  progress: Progress,
  initial_params: Any = None,
) -> TrainResult:
  """Trains, or goes on training, in `folder`.

  A run that was interrupted anywhere and started again ends with the same parameters and the same
  `metrics.jsonl`, bit for bit on the same devices: the data and the dropout of a step depend on its
  number alone, and the checkpoint holds the rest. Metrics of a step are fetched once the next one
  is under way.

  Args:
    evaluate: parameters -> held-out nats per token.
    initial_params: start from these instead of from `seed`.

  Raises:
    LossIsNotFiniteError: training diverged; the last checkpoint from before is kept.
    preemption.Preempted: SIGTERM came; the state is saved.
  """
  init_key, dropout_key = jax.random.split(jax.random.key(seed))
  step_fn = functools.partial(
    train_step.make_train_step(
      model, tx, learning_rate, mesh, accumulation_steps=schedule.accumulation_steps
    ),
    dropout_key=dropout_key,
  )
  abstract = train_step.abstract_state(model, tx, mesh)
  with checkpoint.Checkpoints(folder / "checkpoints", keep=schedule.keep) as checkpoints:
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
    try:
      run = _Run(checkpoints, log, schedule, label, clock)
      bar = progress.track(schedule.num_steps, label=label, unit="steps", start=start)
      with bar as shown, distributed.watched(label) as run.beat:
        state = run.steps(state, step_fn, mixture, mesh, evaluate, shown)
      run.save(state)
      checkpoints.wait()
      if line := clock.line():
        progress.note(f"{label}: {line}")
      step = int(state.step)
      best = step if schedule.patience is None else run.best_step()
      params = state.params
      if best != step:
        params = checkpoints.restore_params(best, abstract.params)
      return TrainResult(best, params, step, log.records)
    finally:
      log.close()


class _Run:
  """One run's bookkeeping around the steps."""

  def __init__(
    self,
    checkpoints: checkpoint.Checkpoints,
    log: MetricsLog,
    schedule: Schedule,
    label: str,
    clock: Clock,
  ):
    self.checkpoints = checkpoints
    self.log = log
    self.schedule = schedule
    self.label = label
    self.clock = clock
    self.beat: Callable[[], None] = lambda: None
    self.skipped_in_a_row = 0

  def steps(self, state, step_fn, mixture, mesh, evaluate, bar):
    s = self.schedule
    start = int(state.step)
    if start == 0 and not self.log.records:
      self.evaluate(0, evaluate, state)
    if self.stops_early():
      return state
    waiting = None  # the metrics of the step before, still on the device
    batches = mixture.iterate(start, num_steps=s.num_steps - start)
    with contextlib.closing(batches):
      for step in range(start + 1, s.num_steps + 1):
        with self.clock.lost_to("data"):
          _, batch = next(batches)
          batch = partitioning.global_batch(batch, mesh)
        if step == start + 1:
          with self.clock.lost_to("compile"):
            state, metrics = step_fn(state, batch)
        else:
          state, metrics = step_fn(state, batch)
        if waiting is not None:
          self.fetch(waiting, step - 1)
        waiting = metrics
        evaluates = step == s.num_steps or step % s.evaluate_every == 0
        saves = step % s.checkpoint_every == 0 or (evaluates and s.patience is not None)
        leaves = preemption.requested(step)
        if evaluates or saves or leaves:
          # Nothing is saved before it is known that the step was sound.
          self.fetch(waiting, step)
          waiting = None
        self.clock.step_done()
        if evaluates:
          self.evaluate(step, evaluate, state)
        if saves:
          self.save(state)
        if evaluates and self.stops_early():
          break
        if leaves:
          self.save(state)
          self.checkpoints.wait()
          raise preemption.Preempted(f"{self.label}: stopped at step {step}, state saved")
        self.show(step, bar)
    return state

  def evaluate(self, step, evaluate, state):
    with self.clock.lost_to("evaluation"):
      self.log.write(step, {"validation/loss": evaluate(state.params)})
    self.beat()

  def show(self, step, bar):
    shown = {} if self.log.last_loss is None else {"loss": self.log.last_loss}
    if step % self.schedule.board_every == 0:
      speed = self.clock.summary(last_steps=self.schedule.board_every)
      self.log.write_speed(step, speed)
      shown["tokens_per_second"] = speed["tokens_per_second"]
      if speed["mfu"] is not None:
        shown["mfu"] = speed["mfu"]
    bar.update(1, **shown)

  def fetch(self, metrics, step):
    values = {f"train/{name}": float(value) for name, value in metrics.items()}
    self.beat()
    self.check(values, step)
    self.log.write(step, values, board=step % self.schedule.board_every == 0)

  def check(self, values, step):
    """Refuses a step that was not sound, unless it was left out."""
    before = next((r for r in reversed(self.log.records) if "train/loss" in r), {})
    if values.get("train/skipped", 0.0) > before.get("train/skipped", 0.0):
      self.skipped_in_a_row += 1
      if self.skipped_in_a_row <= _MAX_SKIPPED_IN_A_ROW:
        return
      fault = f"was the {self.skipped_in_a_row}th in a row to be left out as a spike"
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

  def save(self, state):
    protect = frozenset() if self.schedule.patience is None else frozenset([self.best_step()])
    with self.clock.lost_to("checkpoint"):
      self.log.sync()  # first: a run that goes on from the checkpoint has its steps' metrics
      self.checkpoints.save(state, protect=protect)
    self.beat()

  def evaluations(self) -> list[tuple[float, int]]:
    return [
      (record["validation/loss"], record["step"])
      for record in self.log.records
      if "validation/loss" in record
    ]

  def best_step(self) -> int:
    # Step 0 is the start of the run and never saved.
    return min((e for e in self.evaluations() if e[1] > 0), default=(math.inf, 0))[1]

  def stops_early(self) -> bool:
    evaluations = self.evaluations()
    best = min(range(len(evaluations)), key=lambda i: evaluations[i], default=0)
    patience = self.schedule.patience
    return patience is not None and len(evaluations) - 1 - best >= patience
