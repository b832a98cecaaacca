"""AdamW or Muon with warm-up, cosine decay and clipping, from optax; and steps that spikes skip."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

NAMES = ("adamw", "muon")


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


def make_optimizer(
  name: str,
  schedule: optax.Schedule,
  *,
  weight_decay: float,
  b1: float,
  b2: float,
  eps: float,
  clip_norm: float,
  momentum_dtype: str = "float32",
  skip_spikes: dict[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """The optimizer after clipping by global norm; decay (times the rate) on all but vectors.

  Args:
    name: `adamw`; or `muon` for the layers' matrices (their updates scaled to AdamW's root mean
      square of 0.2, arXiv 2502.16982, so that one rate fits both), with Nesterov's AdamW for the
      rest.
    b1: also Muon's momentum.
    momentum_dtype: of the first moment; `bfloat16` spares two bytes a parameter.
    skip_spikes: arguments of the function of that name.

  Raises:
    ValueError: the name is unknown.
  """
  adam = dict(b1=b1, b2=b2, eps=eps)
  if name == "adamw":
    tx = optax.adamw(
      schedule, **adam, weight_decay=weight_decay, mask=_is_decayed, mu_dtype=momentum_dtype
    )
  elif name == "muon":
    muon = optax.contrib.muon(
      1.0,
      beta=b1,
      eps=eps,
      mu_dtype=momentum_dtype,
      adam_b1=b1,
      adam_b2=b2,
      muon_weight_dimension_numbers=_matrices,
      consistent_rms=0.2,
    )
    # Its own decay would not spare the vectors that go to its AdamW.
    decay = optax.add_decayed_weights(weight_decay, mask=_is_decayed)
    tx = optax.chain(muon, optax.scale(-1.0), decay, optax.scale_by_learning_rate(schedule))
  else:
    raise ValueError(f"optimizer={name!r} is unknown; there are {NAMES}")
  tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
  if skip_spikes is None:
    return optax.with_extra_args_support(tx)
  return _skip_spikes(tx, **skip_spikes)


def _is_vector(path) -> bool:
  return path[-1].key == "scale" or path[-1].key.startswith("b")


def _is_decayed(params):
  return jax.tree.map_with_path(lambda path, _: not _is_vector(path), params)


def _matrices(params):
  """For Muon: which axes of each weight of the (stacked) layers are its matrix's rows, columns."""

  def dimension_numbers(path, _):
    if path[0].key != "layers" or _is_vector(path):
      return None
    letters = path[-1].key.rsplit("_", 1)[1]
    axes = tuple(range(1, len(letters) + 1))
    split = len(axes) - 1 if letters.endswith("D") else 1
    return optax.contrib.MuonDimensionNumbers(axes[:split], axes[split:])

  return jax.tree.map_with_path(dimension_numbers, params)


class SkipSpikesState(NamedTuple):
  """Of `skip_spikes`.

  Attributes:
    losses_W, norms_W: of the last `window` updates that were made, in a ring.
    num_made, num_skipped: updates.
  """

  losses_W: Float[Array, " W"]
  norms_W: Float[Array, " W"]
  num_made: Int[Array, ""]
  num_skipped: Int[Array, ""]
  inner: Any


def _skip_spikes(
  inner: optax.GradientTransformation, *, window: int, num_deviations: float
) -> optax.GradientTransformationExtraArgs:
  """Leaves out updates whose loss or gradient norm leaps, or is not finite.

  A leap is above the mean of the last `window` updates made by more than `num_deviations` of their
  standard deviations; none is seen before there are so many. A skipped update leaves parameters and
  moments as they were, and the schedule of `inner` waits. `update` needs `loss=`.
  """
  if window < 2:
    raise ValueError(f"skip_spikes.window={window} must be at least 2")
  inner = optax.with_extra_args_support(inner)

  def init(params):
    zeros_W = jnp.zeros(window, jnp.float32)
    return SkipSpikesState(zeros_W, zeros_W, jnp.int32(0), jnp.int32(0), inner.init(params))

  def leaps(value, values_W, num_made) -> Bool[Array, ""]:
    limit = jnp.mean(values_W) + num_deviations * jnp.std(values_W)
    return ~jnp.isfinite(value) | ((num_made >= window) & (value > limit))

  def update(grads, state, params=None, *, loss, **extra):
    norm = optax.global_norm(grads)
    skip = leaps(loss, state.losses_W, state.num_made) | leaps(norm, state.norms_W, state.num_made)
    updates, new_inner = inner.update(grads, state.inner, params, loss=loss, **extra)
    place = state.num_made % window
    new = SkipSpikesState(
      state.losses_W.at[place].set(loss),
      state.norms_W.at[place].set(norm),
      state.num_made + 1,
      state.num_skipped,
      new_inner,
    )
    old = state._replace(num_skipped=state.num_skipped + 1)
    updates = jax.tree.map(lambda u: jnp.where(skip, jnp.zeros_like(u), u), updates)
    return updates, jax.tree.map(lambda a, b: jnp.where(skip, a, b), old, new)

  return optax.GradientTransformationExtraArgs(init, update)
