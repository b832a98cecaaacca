"""The training state, created in its shards, and the train step: pure functions."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from selfimprove_jax.models.llama import Llama, init_params
from selfimprove_jax.runtime import partitioning, xla_options
from selfimprove_jax.training.losses import Loss, target_weights
from selfimprove_jax.training.optimizer import SkipSpikesState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
  """State carried from step to step; the data of a step depends on `step` alone.

  The same tree is also used to hold the shardings of such a state, or its shapes.

  Attributes:
    step: number of updates made.
    params: parameters, in `param_dtype`.
    opt_state: optax's state for them.
  """

  step: Any
  params: Any
  opt_state: Any


def train_step(
  state: TrainState,
  batch: Batch,
  key: jax.Array,
  *,
  loss: Loss,
  tx: optax.GradientTransformationExtraArgs,
  learning_rate: optax.Schedule,
  accumulation_steps: int,
) -> tuple[TrainState, Metrics]:
  """Makes one update from a batch of packed rows.

  Args:
    batch: has `loss_mask`; the loss gets it with `weights`, which sum to 1 over the targets of the
      whole batch. So micro-batches add up to the batch's update, however unevenly targets fall.
    key: folded with the step for the loss's dropout.

  Returns:
    the new state, and the loss's metrics next to `loss` (nats per target token for the next-token
    loss), `grad_norm` (before clipping), `tokens` (targets), `learning_rate` (as applied), and, if
    `tx` skips spikes, `skipped` (updates skipped so far).
  """
  num_tokens = jnp.sum(batch["loss_mask"].astype(jnp.float32))
  batch = {**batch, "weights": target_weights(batch["loss_mask"])}
  # The step's number determines its key, so a resumed run draws the same dropout.
  key = jax.random.fold_in(key, state.step)
  gradient = jax.value_and_grad(loss, has_aux=True)
  if accumulation_steps == 1:
    (value, metrics), grads = gradient(state.params, batch, key)
  else:
    (value, metrics), grads = _accumulate(gradient, state.params, batch, key, accumulation_steps)
  # Only `skip_spikes` reads the loss; other optimizers ignore it.
  updates, opt_state = tx.update(grads, state.opt_state, state.params, loss=value)
  params = optax.apply_updates(state.params, updates)
  skips = isinstance(opt_state, SkipSpikesState)
  metrics = metrics | {
    "loss": value,
    "grad_norm": optax.global_norm(grads),  # before `tx` clips it
    "tokens": num_tokens,
    # A skipped spike does not advance the optimizer's schedule.
    "learning_rate": learning_rate(state.opt_state.num_made if skips else state.step),
  }
  if skips:
    metrics["skipped"] = opt_state.num_skipped
  return TrainState(state.step + 1, params, opt_state), metrics


def _accumulate(
  gradient: Callable[..., Any], params: Any, batch: Batch, key: jax.Array, steps: int
) -> Any:
  """Sums losses, metrics and gradients over micro-batches."""
  # Strided, so that every micro-batch has rows on every device: row i goes to micro-batch
  # i % steps, while devices hold blocks of consecutive rows.
  parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, steps, *x.shape[1:]), 1, 0), batch)

  def add(total: Any, part_and_index: Any) -> tuple[Any, None]:
    part, index = part_and_index
    result = gradient(params, part, jax.random.fold_in(key, index))
    return jax.tree.map(jnp.add, total, result), None

  first = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(gradient, params, first, key)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  total, _ = jax.lax.scan(add, zeros, (parts, jnp.arange(steps)))
  return total


def make_train_step(
  loss: Loss,
  model: Llama,
  tx: optax.GradientTransformationExtraArgs,
  learning_rate: optax.Schedule,
  mesh: Mesh,
  *,
  accumulation_steps: int = 1,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns the jitted `train_step(state, batch, key)`, which donates the state.

  Call or lower it with `mesh` in scope (`jax.set_mesh`).
  """
  shardings = state_shardings(model, tx, mesh)
  replicated = partitioning.replicated(mesh)

  def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
    with partitioning.axis_rules():
      return train_step(
        state,
        batch,
        key,
        loss=loss,
        tx=tx,
        learning_rate=learning_rate,
        accumulation_steps=accumulation_steps,
      )

  return jax.jit(
    step,
    in_shardings=(shardings, partitioning.batch_sharding(mesh), replicated),
    # Fixed, so that the next step takes the state without a reshard.
    out_shardings=(shardings, replicated),
    # The new state takes the old one's buffers; otherwise two states would have to fit.
    donate_argnums=0,
    compiler_options=xla_options.for_platform(mesh.devices.flat[0].platform),
  )


def init_state(
  model: Llama,
  tx: optax.GradientTransformation,
  mesh: Mesh,
  *,
  key: jax.Array,
  params: Any = None,
) -> TrainState:
  """Creates the state before the first step, each leaf on the devices that hold it.

  Args:
    params: start from a copy of these (already sharded on `mesh`) instead of from `key`.
  """
  shardings = state_shardings(model, tx, mesh)
  if params is None:
    init = jax.jit(lambda k: nn.unbox(init_params(model, k)), out_shardings=shardings.params)
    params = init(key)
  else:
    params = jax.tree.map(jnp.copy, params)  # the first step donates its state
  opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
  step = jax.device_put(jnp.int32(0), shardings.step)
  return TrainState(step, params, opt_state)


def abstract_state(model: Llama, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Returns shapes, dtypes and shardings of the state; allocates nothing."""

  def make(key: jax.Array) -> TrainState:
    params = nn.unbox(init_params(model, key))
    return TrainState(jnp.int32(0), params, tx.init(params))

  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    jax.eval_shape(make, jax.random.key(0)),
    state_shardings(model, tx, mesh),
  )


def state_shardings(model: Llama, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Returns the sharding of every leaf of the state.

  The optimizer's moments are sharded like their parameters; jit by itself would replicate them.
  optax nests a copy of the parameters' tree in its state, so a leaf there belongs to the parameter
  whose path is the end of its own path. Leaves of no parameter (step counts) are replicated.
  """
  boxed = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
  params = partitioning.param_shardings(boxed, mesh)
  by_path = {_keys(path): sharding for path, sharding in jax.tree.leaves_with_path(params)}
  abstract_opt_state = jax.eval_shape(tx.init, nn.unbox(boxed))

  def sharding(path: Any, _: Any) -> NamedSharding:
    keys = _keys(path)
    ends = (keys[start:] for start in range(len(keys)))
    return next((by_path[end] for end in ends if end in by_path), partitioning.replicated(mesh))

  opt_state = jax.tree.map_with_path(sharding, abstract_opt_state)
  return TrainState(partitioning.replicated(mesh), params, opt_state)


def _keys(path: Any) -> tuple[str, ...]:
  return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
