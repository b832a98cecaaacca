"""The training state, made in its shards, and the step: pure functions of their arguments."""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from selfimprove_jax import partitioning, xla_options
from selfimprove_jax.models.llama import Llama, output_head
from selfimprove_jax.models.params import init_params
from selfimprove_jax.training import losses
from selfimprove_jax.training.optimizer import SkipSpikesState


@flax.struct.dataclass
class TrainState:
  """All that a run carries from step to step; the data's state is `step` too.

  The same tree holds the shardings of such a state, or its shapes.

  Attributes:
    step: number of updates made.
    params: float32 parameters.
    opt_state: optax's state for them.
  """

  step: Any
  params: Any
  opt_state: Any


def state_shardings(model: Llama, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Where every leaf of the state lives.

  The optimizer's moments are sharded like the parameters they belong to: left to itself, jit would
  replicate them. A leaf of the optimizer's state belongs to the parameter whose path its own path
  ends with; what belongs to none (step counts) is replicated.
  """
  boxed = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
  params = partitioning.param_shardings(boxed, mesh)
  by_path = {_keys(path): sharding for path, sharding in jax.tree.leaves_with_path(params)}
  abstract_opt_state = jax.eval_shape(tx.init, nn.unbox(boxed))

  def sharding(path, _):
    keys = _keys(path)
    for start in range(len(keys)):
      if keys[start:] in by_path:
        return by_path[keys[start:]]
    return partitioning.replicated(mesh)

  opt_state = jax.tree.map_with_path(sharding, abstract_opt_state)
  return TrainState(partitioning.replicated(mesh), params, opt_state)


def _keys(path):
  return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def init_state(
  model: Llama,
  tx: optax.GradientTransformation,
  mesh: Mesh,
  *,
  key: jax.Array,
  params: Any = None,
) -> TrainState:
  """The state before the first step, each leaf made where it lives.

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
  """Shapes, dtypes and shardings of the state, with nothing allocated."""

  def make(key):
    params = nn.unbox(init_params(model, key))
    return TrainState(jnp.int32(0), params, tx.init(params))

  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    jax.eval_shape(make, jax.random.key(0)),
    state_shardings(model, tx, mesh),
  )


def train_step(
  state: TrainState,
  batch: dict[str, jax.Array],
  dropout_key: jax.Array,
  *,
  model: Llama,
  tx: optax.GradientTransformationExtraArgs,
  learning_rate: optax.Schedule,
  accumulation_steps: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update from a batch of packed rows.

  With `accumulation_steps` above 1 the batch is taken in that many parts, and gradients are
  weighted by target tokens, so that the update is that of the whole batch however unevenly the
  targets fall. Metrics: `loss` (nats per target token), `grad_norm` (before clipping), `tokens`
  (targets), `learning_rate`, and `skipped` (updates left out so far) if `tx` skips spikes.

  Raises:
    ValueError: the batch does not divide into `accumulation_steps` parts.
  """
  num_rows = len(batch["tokens"])
  if num_rows % accumulation_steps:
    raise ValueError(
      f"a batch of {num_rows} rows does not divide into {accumulation_steps} accumulation_steps"
    )
  num_tokens = jnp.sum(batch["loss_mask"].astype(jnp.float32))
  batch = {**batch, "weights": losses.target_weights(batch["loss_mask"])}
  key = jax.random.fold_in(dropout_key, state.step)

  def loss_fn(params, part, part_key):
    hidden_BTD, _ = model.apply(
      {"params": params},
      part["tokens"],
      part["positions"],
      part["segment_ids"],
      deterministic=model.c.dropout_rate == 0.0,
      logits=False,
      rngs={"dropout": part_key},
    )
    return losses.weighted_loss(hidden_BTD, output_head(params), part["tokens"], part["weights"])

  gradient = jax.value_and_grad(loss_fn)
  if accumulation_steps == 1:
    loss, grads = gradient(state.params, batch, key)
  else:
    # Strided, so that every device has rows of every part.
    parts = jax.tree.map(
      lambda x: jnp.moveaxis(x.reshape(-1, accumulation_steps, *x.shape[1:]), 1, 0), batch
    )

    def accumulate(total, part_and_index):
      part, index = part_and_index
      result = gradient(state.params, part, jax.random.fold_in(key, index))
      return jax.tree.map(jnp.add, total, result), None

    zeros = jax.tree.map(jnp.zeros_like, (num_tokens, state.params))
    (loss, grads), _ = jax.lax.scan(accumulate, zeros, (parts, jnp.arange(accumulation_steps)))

  updates, opt_state = tx.update(grads, state.opt_state, state.params, loss=loss)
  params = optax.apply_updates(state.params, updates)
  metrics = {
    "loss": loss,
    "grad_norm": optax.global_norm(grads),
    "tokens": num_tokens,
    "learning_rate": learning_rate(state.step),
  }
  if isinstance(opt_state, SkipSpikesState):
    metrics["skipped"] = opt_state.num_skipped
  return TrainState(state.step + 1, params, opt_state), metrics


def jit_train_step(
  model: Llama,
  tx: optax.GradientTransformationExtraArgs,
  learning_rate: optax.Schedule,
  mesh: Mesh,
  *,
  accumulation_steps: int,
):
  """`train_step` of `(state, batch, dropout_key)` jitted for a mesh; the state is donated.

  To be called or lowered with `mesh` in scope (`jax.set_mesh`).
  """
  shardings = state_shardings(model, tx, mesh)
  replicated = partitioning.replicated(mesh)

  def step(state, batch, dropout_key):
    with partitioning.axis_rules():
      return train_step(
        state,
        batch,
        dropout_key,
        model=model,
        tx=tx,
        learning_rate=learning_rate,
        accumulation_steps=accumulation_steps,
      )

  return jax.jit(
    step,
    in_shardings=(shardings, partitioning.batch_sharding(mesh), replicated),
    out_shardings=(shardings, replicated),
    donate_argnums=0,
    compiler_options=xla_options.for_platform(mesh.devices.flat[0].platform),
  )


def make_train_step(
  model: Llama,
  tx: optax.GradientTransformationExtraArgs,
  learning_rate: optax.Schedule,
  mesh: Mesh,
  *,
  accumulation_steps: int,
):
  """`jit_train_step` to be called from anywhere."""
  jitted = jit_train_step(model, tx, learning_rate, mesh, accumulation_steps=accumulation_steps)

  def run(state, batch, dropout_key):
    with jax.set_mesh(mesh):
      return jitted(state, batch, dropout_key)

  return run
