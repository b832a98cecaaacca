"""Attention over packed rows, one signature for every implementation.

Axis letters: B batch, T query position, S key position, N query heads, K kv heads, G = N / K
queries per kv head, H head width; C a block of query positions.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from selfimprove_jax import partitioning

IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn", "pallas_gpu")

# Scores of B*N*T*S float32 stand in memory whole below this many query positions: at 2048 that is
# 16 MiB a head and row, and what blocks save is no longer small beside the activations.
BLOCK_QUERIES_FROM = 2048
QUERY_BLOCK = 512

# Both Pallas kernels work on tiles of 128 positions; shorter rows are not worth a kernel.
_TILE = 128


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
  for packed rows and for a cache alike. Without segments a row is one document. A document's tokens
  stand together and in order, so that for kernels causality is by place in the row.

  Args:
    k_BKSH: heads before positions, as the cache holds them: a decode step then reads the cache
      without transposing it. S other than T means a cache.
    implementation: `xla` (any device), `splash` (TPU), `cudnn` (NVIDIA, 16-bit, rows of one
      document), `pallas_gpu` (NVIDIA), or `auto`: the fastest of them that is right for these
      arguments on the devices of the mesh in scope. `splash` and `pallas_gpu` leave a cache, and
      rows shorter than a tile, to `xla`; on a CPU they are interpreted, which is for tests.

  Raises:
    ValueError: the implementation is unknown, cannot honour the segments it was given, or is not
      one for these devices.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"attention={implementation!r} is unknown; choose one of {IMPLEMENTATIONS}")
  T, S = q_BTNH.shape[1], k_BKSH.shape[2]
  is_packed = query_segments_BT is not None
  platform = _platform()
  if implementation == "auto":
    implementation = _choose(q_BTNH, k_BKSH, is_packed=is_packed, platform=platform)
  if implementation == "cudnn":
    if is_packed or T != S:
      raise ValueError(
        "attention='cudnn' takes neither segment ids nor a cache: packed documents would see each "
        "other. Use attention='auto', or rows of one document each"
      )
    return _cudnn(q_BTNH, k_BKSH, v_BKSH)
  if implementation in _KERNELS and T == S and T >= _TILE:
    kernel, device = _KERNELS[implementation]
    if platform not in (device, "cpu"):
      raise ValueError(f"attention={implementation!r} is for {device} devices, not for {platform}")
    return _tiled(
      functools.partial(kernel, interpret=platform == "cpu"),
      q_BTNH,
      k_BKSH,
      v_BKSH,
      query_segments_BT,
    )
  plain = _xla if T < BLOCK_QUERIES_FROM else _xla_blocks
  queries = (q_BTNH, query_positions_BT, query_segments_BT)
  keys = (k_BKSH, v_BKSH, key_positions_BS, key_segments_BS)
  return plain(*queries, *keys) if T != S else _causal_parts(plain, queries, keys)


def _platform():
  """Of the mesh in scope, which may be another machine's that is only compiled for."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  platform = jax.default_backend() if device is None else device.platform
  return "gpu" if platform in ("cuda", "gpu") else platform


def _choose(q_BTNH, k_BKSH, *, is_packed, platform):
  B, T, _, H = q_BTNH.shape
  K, S = k_BKSH.shape[1:3]
  mesh = jax.sharding.get_abstract_mesh()
  if T != S or T % _TILE or (not mesh.empty and (B % _rows(mesh) or K % mesh.shape["tensor"])):
    return "xla"
  if platform == "tpu":
    return "splash"
  if platform == "gpu" and q_BTNH.dtype in (jnp.bfloat16, jnp.float16):
    if is_packed:
      return "pallas_gpu"
    return "cudnn" if H % 8 == 0 and H <= 128 else "xla"
  return "xla"


def _rows(mesh):
  return math.prod(mesh.shape[axis] for axis in partitioning.BATCH_AXES)


def _causal_parts(plain, queries, keys):
  """`plain` over parts of the queries, each with no keys behind its last query.

  With four parts 5/8 of the scores are computed; more would spare little and compile longer.
  """
  q_BTNH, query_positions_BT, query_segments_BT = queries
  k_BKSH, v_BKSH, key_positions_BS, key_segments_BS = keys
  T = q_BTNH.shape[1]
  num_parts = max(1, min(4, T // _TILE))
  ends = [T * (i + 1) // num_parts for i in range(num_parts)]
  contexts = []
  for start, end in zip([0, *ends], ends):
    at = (slice(None), slice(start, end))
    until = (slice(None), slice(0, end))
    contexts.append(
      plain(
        q_BTNH[at],
        query_positions_BT[at],
        None if query_segments_BT is None else query_segments_BT[at],
        k_BKSH[:, :, :end],
        v_BKSH[:, :, :end],
        key_positions_BS[until],
        None if key_segments_BS is None else key_segments_BS[until],
      )
    )
  return jnp.concatenate(contexts, axis=1) if num_parts > 1 else contexts[0]


def _xla_blocks(q_BTNH, query_positions_BT, query_segments_BT, *keys):
  """`_xla` over a block of queries at a time, forwards and backwards."""
  padding = -q_BTNH.shape[1] % QUERY_BLOCK

  def blocks(x_BT):
    if x_BT is None:
      return None
    x_BT = jnp.pad(x_BT, ((0, 0), (0, padding)) + ((0, 0),) * (x_BT.ndim - 2))
    B, T, *rest = x_BT.shape
    return jnp.moveaxis(x_BT.reshape(B, T // QUERY_BLOCK, QUERY_BLOCK, *rest), 1, 0)

  # Without the checkpoint the backward pass would be handed the scores of every block after all.
  attend_block = jax.checkpoint(lambda queries: _xla(*queries, *keys))
  queries = tuple(map(blocks, (q_BTNH, query_positions_BT, query_segments_BT)))
  context_BTNH = jnp.moveaxis(jax.lax.map(attend_block, queries), 0, 1)
  B, _, _, N, H = context_BTNH.shape
  return context_BTNH.reshape(B, -1, N, H)[:, : q_BTNH.shape[1]]


def _xla(
  q_BTNH,
  query_positions_BT,
  query_segments_BT,
  k_BKSH,
  v_BKSH,
  key_positions_BS,
  key_segments_BS,
):
  mask_BTS = attention_mask(
    query_positions_BT, key_positions_BS, query_segments_BT, key_segments_BS
  )
  # Heads before positions makes every product a plain batched matmul, and dividing by the softmax's
  # sum after the second one spares a pass over the scores: twice as fast on CPU, forward and back.
  B, T, N, H = q_BTNH.shape
  K = k_BKSH.shape[1]
  q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  scores_BKGTS = _scores(q_BKGTH, k_BKSH)
  scores_BKGTS += jnp.where(mask_BTS, 0.0, jnp.finfo(jnp.float32).min)[:, None, None]
  largest_BKGT1 = jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1, keepdims=True))
  weights_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT1)
  total_BKGT1 = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
  context_BKGTH = _weighted_sum(weights_BKGTS.astype(v_BKSH.dtype), v_BKSH)
  context_BKGTH = (context_BKGTH / total_BKGT1).astype(q_BTNH.dtype)
  return context_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


# With gradients of their own: those that JAX derives are the same sums, and attention forwards and
# backwards takes up to a quarter longer on CPUs (`_over_queries`).
@jax.custom_vjp
def _scores(q_BKGTH, k_BKSH):
  return jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)


def _scores_forward(q_BKGTH, k_BKSH):
  return _scores(q_BKGTH, k_BKSH), (q_BKGTH, k_BKSH)


def _scores_backward(factors, d_BKGTS):
  q_BKGTH, k_BKSH = factors
  d_BKGTS = d_BKGTS.astype(q_BKGTH.dtype)
  return jnp.einsum("BKGTS,BKSH->BKGTH", d_BKGTS, k_BKSH), _over_queries(q_BKGTH, d_BKGTS)


_scores.defvjp(_scores_forward, _scores_backward)


@jax.custom_vjp
def _weighted_sum(weights_BKGTS, v_BKSH):
  return jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS, v_BKSH, preferred_element_type=jnp.float32)


def _weighted_sum_forward(weights_BKGTS, v_BKSH):
  return _weighted_sum(weights_BKGTS, v_BKSH), (weights_BKGTS, v_BKSH)


def _weighted_sum_backward(factors, d_BKGTH):
  weights_BKGTS, v_BKSH = factors
  d_BKGTH = d_BKGTH.astype(v_BKSH.dtype)
  v_BKHS = jax.lax.optimization_barrier(v_BKSH.swapaxes(2, 3))
  dweights_BKGTS = jnp.einsum("BKGTH,BKHS->BKGTS", d_BKGTH, v_BKHS)
  return dweights_BKGTS, _over_queries(d_BKGTH, weights_BKGTS)


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


def _over_queries(small_BKGTH, large_BKGTS):
  """The sum over queries of their products.

  XLA's CPU backend would transpose the large factor, as its libraries want the summed axis last;
  the barriers keep it to transposing the small one, and the result.
  """
  small_BKHGT = jax.lax.optimization_barrier(small_BKGTH.transpose(0, 1, 4, 2, 3))
  out_BKHS = jnp.einsum("BKHGT,BKGTS->BKHS", small_BKHGT, large_BKGTS)
  return jax.lax.optimization_barrier(out_BKHS).swapaxes(2, 3)


def _cudnn(q_BTNH, k_BKSH, v_BKSH):
  k_BSKH, v_BSKH = k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2)
  return jax.nn.dot_product_attention(
    q_BTNH, k_BSKH, v_BSKH, is_causal=True, implementation="cudnn"
  )


def _tiled(kernel, q_BTNH, k_BKTH, v_BKTH, segments_BT):
  """A kernel over whole tiles of positions; each device its own rows and heads.

  The partitioner cannot look into a Pallas kernel, so the split is made here.
  """
  T = q_BTNH.shape[1]
  padding = -T % _TILE
  if segments_BT is not None:
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, padding)))
  at_positions = ((0, 0), (0, 0), (0, padding), (0, 0))
  q_BNTH, k_BKTH, v_BKTH = (
    jnp.pad(x, at_positions) for x in (q_BTNH.swapaxes(1, 2), k_BKTH, v_BKTH)
  )
  arguments = (q_BNTH, k_BKTH, v_BKTH) + (() if segments_BT is None else (segments_BT,))
  if not jax.sharding.get_abstract_mesh().empty:
    heads = partitioning.spec("batch", "act_heads")
    kernel = jax.shard_map(
      kernel,
      in_specs=(heads, heads, heads, partitioning.spec("batch"))[: len(arguments)],
      out_specs=heads,
      check_vma=False,  # Pallas calls do not say over which axes their results vary
    )
  return kernel(*arguments)[:, :, :T].swapaxes(1, 2)


def _splash(q_BNTH, k_BKTH, v_BKTH, segments_BT=None, *, interpret):
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  N, T, H = q_BNTH.shape[1:]
  block = next(size for size in (1024, 512, 256, _TILE) if T % size == 0)
  compute = min(block, 512)  # what of a block's keys is in registers and scores at a time
  kernel = splash.make_splash_mha_single_device(
    splash.MultiHeadMask([splash.CausalMask((T, T))] * N),
    block_sizes=splash.BlockSizes(
      block_q=block,
      block_kv=block,
      block_kv_compute=compute,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_kv_dkv_compute=compute,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    # So that a remat policy that saves the context spares the backward pass the forward kernel.
    residual_checkpoint_name="context",
    interpret=interpret,
  )
  segments = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BT)
  return jax.vmap(kernel)(q_BNTH * H**-0.5, k_BKTH, v_BKTH, segments)


def _pallas_gpu(q_BNTH, k_BKTH, v_BKTH, segments_BT=None, *, interpret):
  from jax.experimental.pallas.ops.gpu import attention as gpu

  N, H, K = q_BNTH.shape[1], q_BNTH.shape[3], k_BKTH.shape[1]
  k_BTNH, v_BTNH = (jnp.repeat(x, N // K, axis=1).swapaxes(1, 2) for x in (k_BKTH, v_BKTH))
  context_BTNH = gpu.mha(
    q_BNTH.swapaxes(1, 2),
    k_BTNH,
    v_BTNH,
    segments_BT,
    sm_scale=H**-0.5,
    causal=True,
    interpret=interpret,
  )
  return context_BTNH.swapaxes(1, 2)


_KERNELS = {"splash": (_splash, "tpu"), "pallas_gpu": (_pallas_gpu, "gpu")}
