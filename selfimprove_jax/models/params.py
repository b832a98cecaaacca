"""A model's parameters: made, or described by shapes and shardings."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from selfimprove_jax import partitioning
from selfimprove_jax.models.llama import Llama


def init_params(model: Llama, key: jax.Array) -> Any:
  """Parameters with their logical axis names (Flax boxes)."""
  tokens_BT = jnp.zeros((1, 2), jnp.int32)
  return model.init(key, tokens_BT, tokens_BT)["params"]


def abstract_params(model: Llama, mesh: Mesh) -> Any:
  """Shapes, dtypes and shardings of the parameters, with nothing allocated."""
  boxed = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    nn.unbox(boxed),
    partitioning.param_shardings(boxed, mesh),
  )
