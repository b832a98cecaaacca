"""The plain model's sums, arranged so that XLA's CPU backend runs them faster.

`attention="cpu"` chooses it, and so does "auto" on CPUs. Axis letters are those of `llama.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from selfimprove_jax.models import devices


def is_chosen(implementation: str) -> bool:
  """Returns whether a config's `attention` means the form for CPUs."""
  return implementation == "cpu" or (implementation == "auto" and devices.platform() == "cpu")


def recompute(function: Callable[..., Array], c: Any) -> Callable[..., Array]:
  """Makes the backward pass recompute an elementwise function, if a `LlamaConfig` is for CPUs.

  There, repeating elementwise work is faster than writing its inner values to memory and reading
  them back. A remat policy of the config already says what is kept, and is left alone.
  """
  return jax.checkpoint(function) if is_chosen(c.attention) and c.remat == "none" else function


def keep_layout(x: Array) -> Array:
  """Stops XLA on CPUs from moving a transpose past `x`; the identity on other devices."""
  return jax.lax.optimization_barrier(x) if devices.platform() == "cpu" else x


def project_each(
  x_BTD: Float[Array, "B T D"], *weights: Float[Array, "D ..."]
) -> list[Float[Array, "B T ..."]]:
  """Multiplies activations by several weights in one matmul, where that is faster.

  One product with [q k v] leaves one sum of gradients less in the backward pass: a training step
  on CPU gains 3%. With few tokens, joining the weights costs more than it saves; over a sharded
  `tensor` axis the joined outputs would have to be resharded.
  """
  B, T, D = x_BTD.shape
  x_PD = x_BTD.reshape(B * T, D)
  mesh = jax.sharding.get_abstract_mesh()
  flat = [weight.reshape(D, -1) for weight in weights]
  exact = devices.precision(x_PD, *flat)
  if B * T < 2 * D or not (mesh.empty or mesh.shape["tensor"] == 1):
    products = [jnp.dot(x_PD, weight, precision=exact) for weight in flat]
  else:
    splits = np.cumsum([weight.shape[1] for weight in flat])[:-1]
    joined_PF = jnp.dot(x_PD, jnp.concatenate(flat, axis=1), precision=exact)
    products = jnp.split(joined_PF, splits, axis=-1)
  return [product.reshape(B, T, *weight.shape[1:]) for product, weight in zip(products, weights)]


# Attention's two products, with gradients written out. JAX derives the same sums, but for the
# gradients of keys and values XLA's CPU backend then transposes the [T, S] factor, because its
# matmul libraries want the summed axis last; that makes attention up to a quarter slower.


@jax.custom_vjp
def scores(
  q_BKGTH: Float[Array, "B K G T H"], k_BKSH: Float[Array, "B K S H"]
) -> Float[Array, "B K G T S"]:
  """Returns the products of queries and keys, in float32."""
  return jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)


def _scores_forward(q_BKGTH, k_BKSH) -> tuple[Array, tuple[Array, Array]]:
  return scores(q_BKGTH, k_BKSH), (q_BKGTH, k_BKSH)


def _scores_backward(factors, d_BKGTS) -> tuple[Array, Array]:
  q_BKGTH, k_BKSH = factors
  d_BKGTS = d_BKGTS.astype(q_BKGTH.dtype)
  return jnp.einsum("BKGTS,BKSH->BKGTH", d_BKGTS, k_BKSH), _sum_over_queries(q_BKGTH, d_BKGTS)


scores.defvjp(_scores_forward, _scores_backward)


@jax.custom_vjp
def weighted_sum(
  weights_BKGTS: Float[Array, "B K G T S"], v_BKSH: Float[Array, "B K S H"]
) -> Float[Array, "B K G T H"]:
  """Returns the sums of values weighted by attention, in float32."""
  return jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS, v_BKSH, preferred_element_type=jnp.float32)


def _weighted_sum_forward(weights_BKGTS, v_BKSH) -> tuple[Array, tuple[Array, Array]]:
  return weighted_sum(weights_BKGTS, v_BKSH), (weights_BKGTS, v_BKSH)


def _weighted_sum_backward(factors, d_BKGTH) -> tuple[Array, Array]:
  weights_BKGTS, v_BKSH = factors
  d_BKGTH = d_BKGTH.astype(v_BKSH.dtype)
  v_BKHS = jax.lax.optimization_barrier(v_BKSH.swapaxes(2, 3))
  dweights_BKGTS = jnp.einsum("BKGTH,BKHS->BKGTS", d_BKGTH, v_BKHS)
  return dweights_BKGTS, _sum_over_queries(d_BKGTH, weights_BKGTS)


weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


def _sum_over_queries(small_BKGTH, large_BKGTS) -> Float[Array, "B K S H"]:
  """Sums the products of two factors over queries; transposes only the small one."""
  # Without the barriers XLA folds both transposes into the product and transposes the large factor.
  small_BKHGT = jax.lax.optimization_barrier(small_BKGTH.transpose(0, 1, 4, 2, 3))
  out_BKHS = jnp.einsum("BKHGT,BKGTS->BKHS", small_BKHGT, large_BKGTS)
  return jax.lax.optimization_barrier(out_BKHS).swapaxes(2, 3)
