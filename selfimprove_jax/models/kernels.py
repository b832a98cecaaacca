"""Attention kernels for TPUs and NVIDIA GPUs; axis letters are those of `llama.py`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from selfimprove_jax.runtime import partitioning

# Both Pallas kernels work on tiles of 128 positions; shorter rows are not worth a kernel.
TILE = 128


def cudnn(q_BTNH: Array, k_BKSH: Array, v_BKSH: Array) -> Array:
  """Runs cuDNN's attention on rows of one document."""
  k_BSKH, v_BSKH = k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2)
  return jax.nn.dot_product_attention(
    q_BTNH, k_BSKH, v_BSKH, is_causal=True, implementation="cudnn"
  )


def tiled(
  kernel: Callable[..., Array],
  q_BTNH: Array,
  k_BKTH: Array,
  v_BKTH: Array,
  segments_BT: Array | None,
) -> Array:
  """Runs a kernel on whole tiles of positions; each device computes its own rows and heads.

  XLA's partitioner cannot look into a Pallas kernel, so shard_map splits the work.
  """
  T = q_BTNH.shape[1]
  padding = -T % TILE
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
      check_vma=False,  # Pallas calls do not declare over which axes their results vary
    )
  return kernel(*arguments)[:, :, :T].swapaxes(1, 2)


def _splash(q_BNTH, k_BKTH, v_BKTH, segments_BT=None, *, interpret: bool) -> Array:
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  N, T, H = q_BNTH.shape[1:]
  block = next(size for size in (1024, 512, 256, TILE) if T % size == 0)
  compute = min(block, 512)  # keys of a block that are scored at a time
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
    # A remat policy that saves the context then does not run the forward kernel twice.
    residual_checkpoint_name="context",
    interpret=interpret,
  )
  segments = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BT)
  return jax.vmap(kernel)(q_BNTH * H**-0.5, k_BKTH, v_BKTH, segments)


def _pallas_gpu(q_BNTH, k_BKTH, v_BKTH, segments_BT=None, *, interpret: bool) -> Array:
  from jax.experimental.pallas.ops.gpu import attention as gpu

  N, H, K = q_BNTH.shape[1], q_BNTH.shape[3], k_BKTH.shape[1]
  # The kernel has no grouped queries: every query head gets a copy of its keys and values.
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


KERNELS = {"splash": (_splash, "tpu"), "pallas_gpu": (_pallas_gpu, "gpu")}
