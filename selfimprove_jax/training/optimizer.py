"""The optimizers of `TrainingConfig`, from optax, and a wrapper that skips loss spikes."""

from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field

from selfimprove_jax.runtime.config import section


def make(
  name: Literal["adamw", "muon"],
  learning_rate: optax.Schedule,
  *,
  weight_decay: float,
  b1: float,
  b2: float,
  eps: float,
  momentum_dtype: str,
) -> optax.GradientTransformation:
  """Returns AdamW, or Muon with AdamW; neither decays norms and biases.

  Muon is for the layers' matrices, next to AdamW with Nesterov momentum for all other parameters.
  Its updates are scaled to AdamW's usual root mean square of 0.2, so that one learning rate fits
  both (arXiv 2502.16982), and `b1` is its momentum too.
  """
  if name == "adamw":
    moments = dict(b1=b1, b2=b2, eps=eps, mu_dtype=momentum_dtype)
    return optax.adamw(learning_rate, **moments, weight_decay=weight_decay, mask=_is_decayed)
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
  # optax's own weight decay for Muon would also decay the norms and biases that its AdamW updates.
  decay = optax.add_decayed_weights(weight_decay, mask=_is_decayed)
  return optax.chain(muon, optax.scale(-1.0), decay, optax.scale_by_learning_rate(learning_rate))


def _is_vector(path: Any) -> bool:
  return path[-1].key == "scale" or path[-1].key.startswith("b")


def _is_decayed(params: Any) -> Any:
  return jax.tree.map_with_path(lambda path, _: not _is_vector(path), params)


def _matrices(params: Any) -> Any:
  """Tells Muon which axes of a stacked weight are the rows and which the columns of its matrix."""

  def dimension_numbers(path: Any, _: Any) -> optax.contrib.MuonDimensionNumbers | None:
    if path[0].key != "layers" or _is_vector(path):
      return None  # AdamW's
    # Weights map the axes before the split to those after it: D to NH, NH to D, D to F, F to D.
    # Axis 0 is the stack of layers.
    letters = path[-1].key.rsplit("_", 1)[1]
    axes = tuple(range(1, len(letters) + 1))
    split = len(axes) - 1 if letters.endswith("D") else 1
    return optax.contrib.MuonDimensionNumbers(axes[:split], axes[split:])

  return jax.tree.map_with_path(dimension_numbers, params)


@section
class SkipSpikesConfig:
  """Which updates to skip as spikes.

  Attributes:
    window: past updates that loss and gradient norm are compared with; 0 skips nothing.
    num_deviations: standard deviations above their mean from which a value is a spike.
  """

  window: Annotated[int, Field(ge=0)] = 0
  num_deviations: Annotated[float, Field(gt=0)] = 6.0

  def __post_init__(self) -> None:
    if self.window == 1:
      raise ValueError("window=1 has no deviation; it must be 0 (off) or at least 2")


class SkipSpikesState(NamedTuple):
  """The state of `skip_spikes`.

  Attributes:
    losses_W: losses of the last `window` updates that were made, as a ring buffer.
    norms_W: their gradient norms.
    num_made: updates made.
    num_skipped: updates skipped.
    inner: the state of the wrapped optimizer.
  """

  losses_W: Float[Array, " W"]
  norms_W: Float[Array, " W"]
  num_made: Int[Array, ""]
  num_skipped: Int[Array, ""]
  inner: Any


def skip_spikes(
  inner: optax.GradientTransformation, config: SkipSpikesConfig
) -> optax.GradientTransformationExtraArgs:
  """Skips updates whose loss or gradient norm is a spike or not finite.

  A skipped update changes neither parameters nor moments nor the step of the learning rate. Until
  `window` updates were made, only values that are not finite are skipped. `update` needs `loss=`.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params: Any) -> SkipSpikesState:
    zeros_W = jnp.zeros(config.window, jnp.float32)
    return SkipSpikesState(zeros_W, zeros_W, jnp.int32(0), jnp.int32(0), inner.init(params))

  def is_spike(value: Array, values_W: Array, num_made: Array) -> Bool[Array, ""]:
    limit = jnp.mean(values_W) + config.num_deviations * jnp.std(values_W)
    return ~jnp.isfinite(value) | ((num_made >= config.window) & (value > limit))

  def update(
    grads: Any, state: SkipSpikesState, params: Any = None, *, loss: Array, **extra: Any
  ) -> tuple[Any, SkipSpikesState]:
    norm = optax.global_norm(grads)
    skip = is_spike(loss, state.losses_W, state.num_made)
    skip |= is_spike(norm, state.norms_W, state.num_made)
    # Both outcomes are computed and one is selected: a branch would not be faster, as gradients are
    # the costly part, and sharded arrays would need the same layout in both branches.
    updates, new_inner = inner.update(grads, state.inner, params, loss=loss, **extra)
    place = state.num_made % config.window
    new = SkipSpikesState(
      state.losses_W.at[place].set(loss),
      state.norms_W.at[place].set(norm),
      state.num_made + 1,
      state.num_skipped,
      new_inner,
    )
    old = state._replace(num_skipped=state.num_skipped + 1)
    # `where`, not a product with 0: 0 * NaN is NaN.
    updates = jax.tree.map(lambda u: jnp.where(skip, jnp.zeros_like(u), u), updates)
    return updates, jax.tree.map(lambda a, b: jnp.where(skip, a, b), old, new)

  return optax.GradientTransformationExtraArgs(init, update)
