"""Checksums of parameters and optimizer states, to notice damage that a file format does not."""

from typing import Any

import jax
import jax.numpy as jnp


class DamagedCheckpointError(RuntimeError):
  """A checkpoint can't be read, or differs from what was saved."""


def checksums(tree: Any) -> dict[str, int]:
  """Returns a 32-bit checksum of each leaf by its path; the same for every sharding."""
  sums = _leaf_checksums(tree)
  return {jax.tree_util.keystr(path): int(value) for path, value in jax.tree.leaves_with_path(sums)}


@jax.jit
def _leaf_checksums(tree: Any) -> Any:
  def checksum(x: jax.Array) -> jax.Array:
    bits = x
    if x.dtype not in (jnp.int32, jnp.uint32):
      bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    bits = bits.astype(jnp.uint32)
    # The flat index of each element, so that a swap of two elements is noticed.
    place = jnp.uint32(1)
    for axis, size in enumerate(x.shape):
      place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # Bits and place are mixed before the sum: in a plain weighted sum two flipped sign bits cancel.
    mixed = bits * jnp.uint32(0x9E3779B1) + place * jnp.uint32(0x85EBCA6B)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
      mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

  return jax.tree.map(checksum, tree)
