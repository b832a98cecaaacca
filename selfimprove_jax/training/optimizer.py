"""AdamW with warm-up, cosine decay and clipping, from optax."""

import jax
import optax


def warmup_cosine(
  *, peak_lr: float, final_lr: float, warmup_steps: int, num_steps: int
) -> optax.Schedule:
  """Linear warm-up from 0 to `peak_lr`, then a cosine to `final_lr` at `num_steps`."""
  if not 0 <= warmup_steps < num_steps:
    raise ValueError(
      f"warmup_steps={warmup_steps} must be at least 0 and below num_steps={num_steps}"
    )
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0 if warmup_steps else peak_lr,
    peak_value=peak_lr,
    warmup_steps=warmup_steps,
    decay_steps=num_steps,
    end_value=final_lr,
  )


def adamw(
  schedule: optax.Schedule,
  *,
  weight_decay: float,
  b1: float,
  b2: float,
  eps: float,
  clip_norm: float,
) -> optax.GradientTransformation:
  """AdamW after clipping by global norm; decay (times the rate) on all but the norms' weights."""

  def decayed(params):
    return jax.tree.map_with_path(lambda path, _: path[-1].key != "scale", params)

  return optax.chain(
    optax.clip_by_global_norm(clip_norm),
    optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed),
  )
