"""Next-token loss on packed rows; the logits of a large vocabulary never stand in memory whole.

Hidden states are taken in chunks of tokens: the logits of one chunk are made, used and forgotten.
In training a chunk's gradient is computed while its logits are there, so that the backward pass
makes none of them again: three matmuls with the head, as without chunks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from selfimprove_jax import partitioning

# Logits of a chunk, in float32, on one device.
_CHUNK_BYTES = 2**28


def next_token_nll(
  hidden_BTD: Float[Array, "B T D"],
  head_VD: Float[Array, "V D"],
  tokens_BT: Int[Array, "B T"],
  *,
  chunk_tokens: int | None = None,
) -> Float[Array, "B T"]:
  """Nats of each token given what precedes it in its row; 0 for the first, which nothing precedes.

  Entry t belongs to the token at t (predicted at t - 1), so it lines up with the row's `loss_mask`.
  Sharded over the mesh in scope: rows over the batch axes, the vocabulary over `tensor`.

  Args:
    hidden_BTD: what the model gives with `logits=False`; its dtype is that of the matmuls.
    head_VD: the output matrix, any dtype.
    chunk_tokens: tokens of a device whose logits are made at a time; None for as many as fit
      256 MiB.
  """
  nll_BT = _nll(chunk_tokens, hidden_BTD, head_VD, jnp.roll(tokens_BT, -1, axis=1))
  return jnp.roll(nll_BT, 1, axis=1).at[:, 0].set(0.0)


def weighted_loss(
  hidden_BTD: Float[Array, "B T D"],
  head_VD: Float[Array, "V D"],
  tokens_BT: Int[Array, "B T"],
  weights_BT: Float[Array, "B T"],
  *,
  chunk_tokens: int | None = None,
) -> Float[Array, ""]:
  """The sum of `next_token_nll` times weights: what training differentiates, by `jax.grad` only.

  Args:
    weights_BT: of each token as a target: `loss_mask` over the number of targets for their mean.
      Packing never marks the first token of a document, so none is predicted from another one.
  """
  weights_BT = jnp.roll(weights_BT.at[:, 0].set(0.0), -1, axis=1)
  return _weighted_loss(
    chunk_tokens, hidden_BTD, head_VD, jnp.roll(tokens_BT, -1, axis=1), weights_BT
  )


def target_weights(loss_mask_BT: Bool[Array, "B T"]) -> Float[Array, "B T"]:
  """One over the number of target tokens at each of them, for their mean."""
  weights_BT = loss_mask_BT.astype(jnp.float32)
  return weights_BT / jnp.maximum(jnp.sum(weights_BT), 1.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_loss(chunk_tokens, hidden_BTD, head_VD, targets_BT, weights_BT):
  return jnp.sum(_nll(chunk_tokens, hidden_BTD, head_VD, targets_BT) * weights_BT)


def _weighted_loss_forward(chunk_tokens, hidden_BTD, head_VD, targets_BT, weights_BT):
  loss, dhidden_BTD, dhead_VD = _on_mesh(
    functools.partial(_local_loss_and_gradients, chunk_tokens=chunk_tokens),
    (_BATCH, _HEAD, _BATCH, _BATCH),
    (PartitionSpec(), _BATCH, PartitionSpec("tensor", "fsdp")),
  )(hidden_BTD, head_VD, targets_BT, weights_BT)
  return loss, (dhidden_BTD, dhead_VD.astype(head_VD.dtype))


def _weighted_loss_backward(_, gradients, cotangent):
  dhidden_BTD, dhead_VD = gradients
  scaled = (dhidden_BTD * cotangent.astype(dhidden_BTD.dtype), dhead_VD * cotangent)
  return (*scaled, None, None)


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)

_BATCH = PartitionSpec(partitioning.BATCH_AXES)
_HEAD = PartitionSpec("tensor")


def _nll(chunk_tokens, hidden_BTD, head_VD, targets_BT):
  local = functools.partial(_local_nll, chunk_tokens=chunk_tokens)
  return _on_mesh(local, (_BATCH, _HEAD, _BATCH), _BATCH)(hidden_BTD, head_VD, targets_BT)


def _on_mesh(function, in_specs, out_specs):
  """`function(sharded, ...)` on each device's part of the arguments; on one device, on all."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return functools.partial(function, False)
  return jax.shard_map(
    functools.partial(function, True), in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


def _local_nll(sharded, hidden_BTD, head_VD, targets_BT, *, chunk_tokens):
  head_VD = head_VD.astype(hidden_BTD.dtype)

  def chunk(_, hidden_and_targets):
    hidden_CD, targets_C = hidden_and_targets
    return None, _softmax(sharded, hidden_CD, head_VD, targets_C)[0]

  _, nll = _scan_chunks(chunk, None, (hidden_BTD, targets_BT), head_VD.shape[0], chunk_tokens)
  return nll


def _local_loss_and_gradients(
  sharded, hidden_BTD, head_VD, targets_BT, weights_BT, *, chunk_tokens
):
  head_VD = head_VD.astype(hidden_BTD.dtype)

  def chunk(carry, part):
    loss, dhead_DV = carry
    hidden_CD, targets_C, weights_C = part
    nll_C, dlogits_CV = _softmax(sharded, hidden_CD, head_VD, targets_C, weights_C)
    dlogits_CV = dlogits_CV.astype(hidden_CD.dtype)
    dhidden_CD = jnp.dot(dlogits_CV, head_VD)
    # The barriers keep the small factor the transposed one: on CPUs that takes two thirds of the
    # time of the other way, to which XLA would turn it.
    hidden_DC = jax.lax.optimization_barrier(hidden_CD.T)
    dhead_DV += jnp.dot(hidden_DC, dlogits_CV, preferred_element_type=jnp.float32)
    return (loss + jnp.sum(nll_C * weights_C), dhead_DV), dhidden_CD

  zeros = (jnp.float32(0.0), jnp.zeros(head_VD.shape[::-1], jnp.float32))
  (loss, dhead_DV), dhidden_BTD = _scan_chunks(
    chunk, zeros, (hidden_BTD, targets_BT, weights_BT), head_VD.shape[0], chunk_tokens
  )
  dhead_VD = jax.lax.optimization_barrier(dhead_DV).T
  if sharded:
    loss = jax.lax.psum(loss, partitioning.BATCH_AXES)
    dhead_VD = jax.lax.psum(dhead_VD, ("dcn", "data"))
    dhead_VD = jax.lax.psum_scatter(dhead_VD, "fsdp", scatter_dimension=1, tiled=True)
    dhidden_BTD = jax.lax.psum(dhidden_BTD, "tensor")
  return loss, dhidden_BTD, dhead_VD


def _softmax(sharded, hidden_CD, head_VD, targets_C, weights_C=None):
  """Nats of each target; and the weighted loss's gradient by the logits, if there are weights."""
  logits_CV = jnp.dot(hidden_CD, head_VD.T, preferred_element_type=jnp.float32)
  num_rows = head_VD.shape[0]
  if sharded:  # this device has some rows of the head: count from the first
    targets_C -= jax.lax.axis_index("tensor") * num_rows
  largest_C = jnp.max(logits_CV, axis=-1)
  if sharded:
    largest_C = jax.lax.pmax(largest_C, "tensor")
  exp_CV = jnp.exp(logits_CV - largest_C[:, None])
  total_C = jnp.sum(exp_CV, axis=-1)
  is_here_C = (targets_C >= 0) & (targets_C < num_rows)
  rows_C = jnp.clip(targets_C, 0, num_rows - 1)
  target_C = jnp.take_along_axis(logits_CV, rows_C[:, None], axis=1)[:, 0]
  target_C = jnp.where(is_here_C, target_C, 0.0)
  if sharded:
    total_C, target_C = jax.lax.psum((total_C, target_C), "tensor")
  nll_C = jnp.log(total_C) + largest_C - target_C
  if weights_C is None:
    return nll_C, None
  is_target_CV = jax.lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1) == targets_C[:, None]
  scale_C = weights_C / total_C
  dlogits_CV = exp_CV * scale_C[:, None] - jnp.where(is_target_CV, weights_C[:, None], 0.0)
  return nll_C, dlogits_CV


def _scan_chunks(chunk, carry, parts, vocab_size, chunk_tokens):
  """`lax.scan` over chunks of the tokens of [B, T, ..] arrays; what it stacks has their shape."""
  B, T = parts[0].shape[:2]
  size = min(chunk_tokens or max(_CHUNK_BYTES // (4 * vocab_size), 1), B * T)
  num_chunks = -(-B * T // size)
  size = -(-B * T // num_chunks)  # even chunks, of whole tiles
  if size > 128:
    size = min(-(-size // 128) * 128, B * T)
    num_chunks = -(-B * T // size)
  padding = num_chunks * size - B * T

  def split(x):
    x = x.reshape(B * T, *x.shape[2:])
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(num_chunks, size, *x.shape[1:])

  if num_chunks == 1:
    carry, stacked = chunk(carry, jax.tree.map(lambda x: x.reshape(B * T, *x.shape[2:]), parts))
  else:
    carry, stacked = jax.lax.scan(chunk, carry, jax.tree.map(split, parts))
    stacked = stacked.reshape(num_chunks * size, *stacked.shape[2:])[: B * T]
  return carry, stacked.reshape(B, T, *stacked.shape[1:])
