"""The config of a training run; builds the optimizer and the schedules it describes."""

from typing import Annotated, Literal

import optax
from pydantic import Field

from selfimprove_jax.runtime.config import section
from selfimprove_jax.training import optimizer
from selfimprove_jax.training.optimizer import SkipSpikesConfig

_Count = Annotated[int, Field(ge=1)]
_Fraction = Annotated[float, Field(ge=0, lt=1)]
_Positive = Annotated[float, Field(gt=0)]


@section
class TrainingConfig:
  """How a run optimizes, and how often it evaluates, saves and reports.

  Attributes:
    batch_rows: rows per update, over all devices.
    warmup_fraction: share of the steps in which the learning rate rises linearly from 0.
    final_lr: learning rate that a cosine reaches at the last step.
    momentum_dtype: dtype of the first moment; "bfloat16" saves two bytes per parameter.
    b1: decay of the first moment; also Muon's momentum.
    b2: decay of the second moment.
    clip_norm: largest global norm of the gradient.
    accumulation_steps: micro-batches per update.
    num_evaluations: evaluations, evenly spaced, the last one after the last step.
    num_checkpoints: saves of the state, spaced likewise.
    keep: checkpoints that stay on disk, the last ones.
    patience: stop after this many evaluations without a lower loss; None never stops early.
    stop_at_loss: stop once the validation loss is at most this; None never does.
    board_every: steps per point of the TensorBoard curves; `metrics.jsonl` has every step.
  """

  batch_rows: _Count
  peak_lr: _Positive
  final_lr: Annotated[float, Field(ge=0)]
  warmup_fraction: _Fraction = 0.05
  optimizer: Literal["adamw", "muon"] = "adamw"
  momentum_dtype: Literal["float32", "bfloat16"] = "float32"
  skip_spikes: SkipSpikesConfig = SkipSpikesConfig()
  b1: _Fraction = 0.9
  b2: _Fraction = 0.95
  eps: _Positive = 1e-8
  clip_norm: _Positive = 1.0
  accumulation_steps: _Count = 1
  num_evaluations: _Count = 10
  num_checkpoints: _Count = 4
  keep: _Count = 2
  patience: _Count | None = None
  stop_at_loss: _Positive | None = None
  board_every: _Count = 10

  def __post_init__(self) -> None:
    if self.batch_rows % self.accumulation_steps:
      raise ValueError(
        f"batch_rows={self.batch_rows} must be a multiple of "
        f"accumulation_steps={self.accumulation_steps}"
      )

  def learning_rate(self, num_steps: int) -> optax.Schedule:
    """Returns the warm-up and cosine of a run of `num_steps` updates."""
    # A run of one step has no warm-up: the rate would be 0.
    warmup_steps = min(round(self.warmup_fraction * num_steps), num_steps - 1)
    return optax.warmup_cosine_decay_schedule(
      init_value=0.0 if warmup_steps else self.peak_lr,
      peak_value=self.peak_lr,
      warmup_steps=warmup_steps,
      decay_steps=num_steps,
      end_value=self.final_lr,
    )

  def make_optimizer(
    self, learning_rate: optax.Schedule, *, weight_decay: float
  ) -> optax.GradientTransformationExtraArgs:
    """Returns clipping by global norm, then the optimizer; its `update` takes `loss=`."""
    tx = optimizer.make(
      self.optimizer,
      learning_rate,
      weight_decay=weight_decay,
      b1=self.b1,
      b2=self.b2,
      eps=self.eps,
      momentum_dtype=self.momentum_dtype,
    )
    tx = optax.chain(optax.clip_by_global_norm(self.clip_norm), tx)
    if self.skip_spikes.window:
      return optimizer.skip_spikes(tx, self.skip_spikes)
    return optax.with_extra_args_support(tx)

  def evaluate_every(self, num_steps: int) -> int:
    return -(-num_steps // self.num_evaluations)

  def checkpoint_every(self, num_steps: int) -> int:
    return -(-num_steps // self.num_checkpoints)

  def saves_at(self, step: int, num_steps: int) -> bool:
    """Tells whether the state is saved after a step of an uninterrupted run."""
    evaluates = step % self.evaluate_every(num_steps) == 0
    # With patience the best parameters are the result, so every evaluated state is saved.
    return (
      step == num_steps
      or step % self.checkpoint_every(num_steps) == 0
      or (evaluates and self.patience is not None)
    )
