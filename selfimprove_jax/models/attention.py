"""Attention over packed rows, one signature for every implementation.

Axis letters: B batch, T query position, S key position, N query heads, K kv heads, G = N / K
queries per kv head, H head width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

IMPLEMENTATIONS = ("xla", "cudnn")


def attention_mask(
  query_positions_BT: Int[Array, "B T"],
  key_positions_BS: Int[Array, "B S"],
  query_segments_BT: Int[Array, "B T"] | None,
  key_segments_BS: Int[Array, "B S"] | None,
) -> Bool[Array, "B T S"]:
  """True where a query may look: not ahead of itself, and within its own document."""
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
  implementation: str,
) -> Float[Array, "B T N H"]:
  """Causal grouped-query attention; packed documents never see each other.

  Positions count from the start of a document, so causality is "key position <= query position"
  for packed rows and for a cache alike. Without segments a row is one document.

  Args:
    k_BKSH: heads before positions, as the cache holds them: a decode step then reads the cache
      without transposing it.
    implementation: `xla` (any device), or `cudnn` (NVIDIA, bf16, rows of one document).

  Raises:
    ValueError: the implementation is unknown, or cannot honour the segments it was given.
  """
  if implementation == "xla":
    mask_BTS = attention_mask(
      query_positions_BT, key_positions_BS, query_segments_BT, key_segments_BS
    )
    return _xla(q_BTNH, k_BKSH, v_BKSH, mask_BTS)
  if implementation == "cudnn":
    if query_segments_BT is not None or q_BTNH.shape[1] != k_BKSH.shape[2]:
      raise ValueError(
        "attention='cudnn' takes neither segment ids nor a cache: packed documents would see each "
        "other. Use attention='xla', or rows of one document each"
      )
    k_BSKH, v_BSKH = k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2)
    return jax.nn.dot_product_attention(
      q_BTNH, k_BSKH, v_BSKH, is_causal=True, implementation="cudnn"
    )
  raise ValueError(f"attention={implementation!r} is unknown; choose one of {IMPLEMENTATIONS}")


def _xla(q_BTNH, k_BKSH, v_BKSH, mask_BTS):
  # Heads before positions makes every product a plain batched matmul, and dividing by the softmax's
  # sum after the second one spares a pass over the scores: twice as fast on CPU, forward and back.
  B, T, N, H = q_BTNH.shape
  K = k_BKSH.shape[1]
  q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  scores_BKGTS = jnp.einsum(
    "BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32
  )
  scores_BKGTS += jnp.where(mask_BTS, 0.0, jnp.finfo(jnp.float32).min)[:, None, None]
  largest_BKGT1 = jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1, keepdims=True))
  weights_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT1)
  total_BKGT1 = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
  context_BKGTH = jnp.einsum(
    "BKGTS,BKSH->BKGTH",
    weights_BKGTS.astype(v_BKSH.dtype),
    v_BKSH,
    preferred_element_type=jnp.float32,
  )
  context_BKGTH = (context_BKGTH / total_BKGT1).astype(q_BTNH.dtype)
  return context_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
