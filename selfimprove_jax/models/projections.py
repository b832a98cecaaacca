"""Weights by name, and their products with activations, as matmuls of two matrices."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_LOGICAL_AXES = {"D": "embed", "N": "heads", "K": "kv_heads", "F": "mlp", "V": "vocab"}
_LOGICAL_AXES |= {"H": None, "J": None}  # whole everywhere


def project(x, weight, dtype=None):
  """`x_BTi..` times `weight_i..o..`: the weight's leading axes are those of x after B and T.

  As one matmul of two matrices: XLA's CPU backend takes twice as long over the weight's gradient
  when B and T stay apart.
  """
  B, T, *contracted = x.shape
  out = weight.shape[len(contracted) :]
  i = math.prod(contracted)
  y = jnp.dot(x.reshape(B * T, i), weight.reshape(i, -1), preferred_element_type=dtype)
  return y.reshape(B, T, *out)


def project_each(x_BTD, *weights):
  """`project` of x by each of the weights, as one matmul where that is faster.

  One product of [q k v] and, backwards, one sum less: a training step on CPU gains 3%. Not for
  fewer tokens than copying the weights is worth, nor where their outputs lie on several devices.
  """
  B, T, D = x_BTD.shape
  mesh = jax.sharding.get_abstract_mesh()
  if B * T < 2 * D or not (mesh.empty or mesh.shape["tensor"] == 1):
    return [project(x_BTD, weight) for weight in weights]
  sizes = [math.prod(weight.shape[1:]) for weight in weights]
  joined_DO = jnp.concatenate([weight.reshape(D, -1) for weight in weights], axis=1)
  parts = jnp.split(project(x_BTD, joined_DO), np.cumsum(sizes)[:-1], axis=-1)
  return [part.reshape(B, T, *weight.shape[1:]) for part, weight in zip(parts, weights)]


def make_weight(module, c, name, shape, fan_in=None):
  """A matrix whose logical axes are the letters of its name, in the compute dtype."""
  init = nn.initializers.normal((fan_in or shape[0]) ** -0.5)
  init = nn.with_logical_partitioning(init, _axes(name))
  return module.param(name, init, shape, jnp.dtype(c.param_dtype)).astype(c.dtype)


def make_bias(module, c, name, shape):
  init = nn.with_logical_partitioning(nn.initializers.zeros, _axes(name))
  return module.param(name, init, shape, jnp.dtype(c.param_dtype)).astype(c.dtype)


def _axes(name):
  return tuple(_LOGICAL_AXES[letter] for letter in name.rsplit("_", 1)[1])
