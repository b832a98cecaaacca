"""Causal grouped-query attention over packed rows, one signature for every implementation.

Axis letters are those of `llama.py`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from selfimprove_jax.models import cpu, devices, kernels
from selfimprove_jax.runtime import partitioning

Implementation = Literal["auto", "xla", "cpu", "splash", "cudnn", "pallas_gpu"]
_Queries = tuple[Array, Array, Array | None]  # q_BTNH, positions_BT, segments_BT
_Keys = tuple[Array, Array, Array, Array | None]  # k_BKSH, v_BKSH, positions_BS, segments_BS
_Part = Callable[[_Queries, _Keys], Array]

# From this many query positions on, attention takes blocks of them: at 2048 the float32 scores are
# 16 MiB per head and row, no longer small next to the activations.
BLOCK_QUERIES_FROM = 2048
QUERY_BLOCK = 512


def attention_mask(
  query_positions_BT: Int[Array, "B T"],
  key_positions_BS: Int[Array, "B S"],
  query_segments_BT: Int[Array, "B T"] | None,
  key_segments_BS: Int[Array, "B S"] | None,
) -> Bool[Array, "B T S"]:
  """Returns True where a query may look: not ahead of itself, and within its own document."""
  mask_BTS = key_positions_BS[:, None, :] <= query_positions_BT[:, :, None]
  if query_segments_BT is not None and key_segments_BS is not None:
    mask_BTS &= key_segments_BS[:, None, :] == query_segments_BT[:, :, None]
  return mask_BTS


def attend(
  q_BTNH: Float[Array, "B T N H"],
  k_BKSH: Float[Array, "B K S H"],
  v_BKSH: Float[Array, "B K S H"],
  *,
  query_positions_BT: Int[Array, "B T"],
  key_positions_BS: Int[Array, "B S"],
  query_segments_BT: Int[Array, "B T"] | None,
  key_segments_BS: Int[Array, "B S"] | None,
  implementation: Implementation,
) -> Float[Array, "B T N H"]:
  """Computes attention; packed documents never see each other.

  Positions count from the start of a document, so a key is in the past if its position is at most
  the query's, in packed rows and in a cache alike. The tokens of a document stand together and in
  order, so kernels may use the place in the row instead.

  Args:
    k_BKSH: heads come before positions, as in the cache: a decode step then reads the cache without
      transposing it. S differs from T only with a cache.
    query_segments_BT: document of each token; None if a row is one document.
    implementation:
      "xla": plain, on any device.
      "cpu": the same sums with gradients arranged for CPUs.
      "splash": Pallas kernel for TPUs.
      "pallas_gpu": Pallas kernel for NVIDIA GPUs.
      "cudnn": NVIDIA GPUs, 16-bit, rows of one document.
      "auto": the fastest of them that is right for these arguments on the mesh in scope.
      Both Pallas kernels leave a cache, and rows shorter than a tile, to "xla". On CPUs they run in
      interpret mode, which is for tests.

  Raises:
    ValueError: the implementation cannot honor segments or a cache, or is for other devices.
  """
  T, S = q_BTNH.shape[1], k_BKSH.shape[2]
  is_packed, platform = query_segments_BT is not None, devices.platform()
  if implementation == "auto":
    implementation = _choose(q_BTNH, k_BKSH, is_packed=is_packed, platform=platform)
  if implementation == "cudnn":
    if is_packed or T != S:
      raise ValueError(
        "attention='cudnn' takes neither segment ids nor a cache: packed documents would see each "
        "other. Use attention='auto', or rows of one document each"
      )
    return kernels.cudnn(q_BTNH, k_BKSH, v_BKSH)
  if implementation in kernels.KERNELS and T == S and T >= kernels.TILE:
    kernel, device = kernels.KERNELS[implementation]
    if platform not in (device, "cpu"):
      raise ValueError(f"attention={implementation!r} is for {device} devices, not for {platform}")
    kernel = functools.partial(kernel, interpret=platform == "cpu")
    return kernels.tiled(kernel, q_BTNH, k_BKSH, v_BKSH, query_segments_BT)
  products = (cpu.scores, cpu.weighted_sum) if implementation == "cpu" else _PRODUCTS
  attend_part = functools.partial(
    _softmax_attention if T < BLOCK_QUERIES_FROM else _in_blocks, products=products
  )
  queries = (q_BTNH, query_positions_BT, query_segments_BT)
  keys = (k_BKSH, v_BKSH, key_positions_BS, key_segments_BS)
  return attend_part(queries, keys) if T != S else _in_causal_parts(attend_part, queries, keys)


def _choose(q_BTNH: Any, k_BKSH: Any, *, is_packed: bool, platform: str) -> Implementation:
  B, T, _, H = q_BTNH.shape
  K, S = k_BKSH.shape[1:3]
  if platform == "cpu":
    return "cpu"
  if T != S or T % kernels.TILE:
    return "xla"
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:  # `kernels.tiled` gives every device the same number of rows and heads
    shards = math.prod(mesh.shape[axis] for axis in partitioning.BATCH_AXES)
    if B % shards or K % mesh.shape["tensor"]:
      return "xla"
  if platform == "tpu":
    return "splash"
  if platform == "gpu" and q_BTNH.dtype in (jnp.bfloat16, jnp.float16):
    if is_packed:
      return "pallas_gpu"
    return "cudnn" if H % 8 == 0 and H <= 128 else "xla"
  return "xla"


def _product(subscripts: str, a: Array, b: Array) -> Array:
  exact = devices.precision(a, b)
  return jnp.einsum(subscripts, a, b, precision=exact, preferred_element_type=jnp.float32)


# The two products of attention; `cpu.scores` and `cpu.weighted_sum` have other gradients.
_PRODUCTS = (
  functools.partial(_product, "BKGTH,BKSH->BKGTS"),
  functools.partial(_product, "BKGTS,BKSH->BKGTH"),
)


def _softmax_attention(queries: _Queries, keys: _Keys, *, products: Any) -> Array:
  q_BTNH, query_positions_BT, query_segments_BT = queries
  k_BKSH, v_BKSH, key_positions_BS, key_segments_BS = keys
  scores, weighted_sum = products
  mask_BTS = attention_mask(
    query_positions_BT, key_positions_BS, query_segments_BT, key_segments_BS
  )
  # Heads come before positions, so that every product is a plain batched matmul.
  B, T, N, H = q_BTNH.shape
  K = k_BKSH.shape[1]
  q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  scores_BKGTS = scores(q_BKGTH, k_BKSH)
  # Not -inf: with -inf in all of a row, the subtraction below would make NaN.
  scores_BKGTS += jnp.where(mask_BTS, 0.0, jnp.finfo(jnp.float32).min)[:, None, None]
  largest_BKGT1 = jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1, keepdims=True))
  weights_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT1)
  total_BKGT1 = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
  context_BKGTH = weighted_sum(weights_BKGTS.astype(v_BKSH.dtype), v_BKSH)
  # The softmax's division comes after the product: it is over H numbers per query instead of S.
  context_BKGTH = (context_BKGTH / total_BKGT1).astype(q_BTNH.dtype)
  return context_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _in_causal_parts(attend_part: _Part, queries: _Queries, keys: _Keys) -> Array:
  """Attends from parts of the queries, each to the keys up to its last query only.

  With four parts 5/8 of the scores are computed; more parts would save little and compile longer.
  """
  k_BKSH, v_BKSH, *labels_BS = keys
  T = queries[0].shape[1]
  num_parts = max(1, min(4, T // kernels.TILE))
  ends = [T * (i + 1) // num_parts for i in range(num_parts)]
  contexts = []
  for start, end in zip([0, *ends], ends):
    part = jax.tree.map(lambda x, at=slice(start, end): x[:, at], queries)
    labels = jax.tree.map(lambda x, end=end: x[:, :end], labels_BS)
    contexts.append(attend_part(part, (k_BKSH[:, :, :end], v_BKSH[:, :, :end], *labels)))
  return jnp.concatenate(contexts, axis=1) if num_parts > 1 else contexts[0]


def _in_blocks(queries: _Queries, keys: _Keys, *, products: Any) -> Array:
  """Attends from one block of queries at a time, in the backward pass too."""
  num_queries = queries[0].shape[1]
  padding = -num_queries % QUERY_BLOCK

  def blocks(x_BT: Array) -> Array:
    x_BT = jnp.pad(x_BT, ((0, 0), (0, padding)) + ((0, 0),) * (x_BT.ndim - 2))
    B, T, *rest = x_BT.shape
    return jnp.moveaxis(x_BT.reshape(B, T // QUERY_BLOCK, QUERY_BLOCK, *rest), 1, 0)

  # Without the checkpoint the forward pass would keep the scores of every block after all.
  attend_block = jax.checkpoint(lambda block: _softmax_attention(block, keys, products=products))
  context_BTNH = jnp.moveaxis(jax.lax.map(attend_block, jax.tree.map(blocks, queries)), 0, 1)
  B, _, _, N, H = context_BTNH.shape
  return context_BTNH.reshape(B, -1, N, H)[:, :num_queries]
