"""Losses of the train step; the next-token loss on packed rows never holds all logits in memory.

Hidden states are processed in chunks of tokens: only one chunk has logits at a time. In
training a chunk's gradient is computed while its logits exist, so the backward pass recomputes
none: three matmuls with the head, as without chunks.

Axis letters are those of `llama.py`; C is a chunk of tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from selfimprove_jax.models import cpu, devices
from selfimprove_jax.models.llama import Llama, output_head
from selfimprove_jax.runtime import partitioning

# (params, batch, key) -> (loss, metrics). Both are sums over the batch's rows, so that they add up
# over micro-batches; `batch["weights"]` sum to 1 over the targets of the whole batch.
Loss = Callable[[Any, dict[str, Array], Array], tuple[Array, dict[str, Array]]]

_CHUNK_BYTES = 2**28  # float32 logits of a chunk on one device
_BATCH = PartitionSpec(partitioning.BATCH_AXES)
_HEAD = PartitionSpec("tensor")


def next_token_loss(model: Llama) -> Loss:
  """Returns the loss in nats per target token; `loss_mask` says what is a target."""

  def loss(params: Any, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
    hidden_BTD, _ = model.apply(
      {"params": params},
      batch["tokens"],
      batch["positions"],
      batch["segment_ids"],
      deterministic=model.c.dropout_rate == 0.0,
      logits=False,
      rngs={"dropout": key},
    )
    return weighted_loss(hidden_BTD, output_head(params), batch["tokens"], batch["weights"]), {}

  return loss


def target_weights(loss_mask_BT: Bool[Array, "B T"]) -> Float[Array, "B T"]:
  """Returns 1 / (number of targets) at each target, for the mean over them."""
  weights_BT = loss_mask_BT.astype(jnp.float32)
  return weights_BT / jnp.maximum(jnp.sum(weights_BT), 1.0)


def next_token_nll(
  hidden_BTD: Float[Array, "B T D"],
  head_VD: Float[Array, "V D"],
  tokens_BT: Int[Array, "B T"],
  *,
  chunk_tokens: int | None = None,
) -> Float[Array, "B T"]:
  """Returns the nats of each token given those before it in its row; 0 for the first of a row.

  Entry t belongs to the token at t (predicted at t - 1), so it lines up with `loss_mask`. On the
  mesh in scope rows are sharded over the batch axes, the vocabulary over `tensor`.

  Args:
    hidden_BTD: the model's hidden states; the matmuls are in their dtype.
    head_VD: the output matrix, in any dtype.
    chunk_tokens: tokens per chunk and device; None for as many as fit in 256 MiB of logits.
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
  """Returns the sum of `next_token_nll` times weights; its gradient is computed chunk by chunk.

  Differentiable in reverse mode, by hidden states and head only.

  Args:
    weights_BT: weight of each token as a target. Packing never makes the first token of a document
      a target, so no token is predicted from another document.
  """
  weights_BT = jnp.roll(weights_BT.at[:, 0].set(0.0), -1, axis=1)
  targets_BT = jnp.roll(tokens_BT, -1, axis=1)
  return _weighted_loss(chunk_tokens, hidden_BTD, head_VD, targets_BT, weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_loss(chunk_tokens, hidden_BTD, head_VD, targets_BT, weights_BT) -> Array:
  return jnp.sum(_nll(chunk_tokens, hidden_BTD, head_VD, targets_BT) * weights_BT)


def _weighted_loss_forward(
  chunk_tokens, hidden_BTD, head_VD, targets_BT, weights_BT
) -> tuple[Array, tuple[Array, Array]]:
  # The gradients are computed here, where the logits are, for a cotangent of 1.
  loss, dhidden_BTD, dhead_VD = _on_mesh(
    functools.partial(_local_loss_and_gradients, chunk_tokens=chunk_tokens),
    (_BATCH, _HEAD, _BATCH, _BATCH),
    (PartitionSpec(), _BATCH, PartitionSpec("tensor", "fsdp")),
  )(hidden_BTD, head_VD, targets_BT, weights_BT)
  return loss, (dhidden_BTD, dhead_VD.astype(head_VD.dtype))


def _weighted_loss_backward(_, gradients, cotangent) -> tuple[Array | None, ...]:
  dhidden_BTD, dhead_VD = gradients
  return dhidden_BTD * cotangent.astype(dhidden_BTD.dtype), dhead_VD * cotangent, None, None


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


def _nll(chunk_tokens, hidden_BTD, head_VD, targets_BT) -> Array:
  local = functools.partial(_local_nll, chunk_tokens=chunk_tokens)
  return _on_mesh(local, (_BATCH, _HEAD, _BATCH), _BATCH)(hidden_BTD, head_VD, targets_BT)


def _on_mesh(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
  """Runs `function(sharded, ...)` on each device's part of the arguments, or on all of them."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return functools.partial(function, False)
  return jax.shard_map(
    functools.partial(function, True), in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


def _local_nll(sharded: bool, hidden_BTD, head_VD, targets_BT, *, chunk_tokens) -> Array:
  head_VD = head_VD.astype(hidden_BTD.dtype)

  def chunk(_, part) -> tuple[None, Array]:
    hidden_CD, targets_C = part
    return None, _softmax(sharded, hidden_CD, head_VD, targets_C)[0]

  _, nll_BT = _scan_chunks(chunk, None, (hidden_BTD, targets_BT), head_VD.shape[0], chunk_tokens)
  return nll_BT


def _local_loss_and_gradients(
  sharded: bool, hidden_BTD, head_VD, targets_BT, weights_BT, *, chunk_tokens
) -> tuple[Array, Array, Array]:
  head_VD = head_VD.astype(hidden_BTD.dtype)

  def chunk(carry, part) -> tuple[tuple[Array, Array], Array]:
    loss, dhead_DV = carry
    hidden_CD, targets_C, weights_C = part
    nll_C, dlogits_CV = _softmax(sharded, hidden_CD, head_VD, targets_C, weights_C)
    dlogits_CV = dlogits_CV.astype(hidden_CD.dtype)
    exact = devices.precision(dlogits_CV, head_VD)
    dhidden_CD = jnp.dot(dlogits_CV, head_VD, precision=exact)
    # The head's gradient is accumulated as [D, V]: transposing the hidden states is cheaper than
    # transposing the logits' gradient, which XLA on CPUs does if it may; that takes half as long
    # again.
    hidden_DC = cpu.keep_layout(hidden_CD.T)
    dhead_DV += jnp.dot(hidden_DC, dlogits_CV, precision=exact, preferred_element_type=jnp.float32)
    return (loss + jnp.sum(nll_C * weights_C), dhead_DV), dhidden_CD

  zeros = (jnp.float32(0.0), jnp.zeros(head_VD.shape[::-1], jnp.float32))
  (loss, dhead_DV), dhidden_BTD = _scan_chunks(
    chunk, zeros, (hidden_BTD, targets_BT, weights_BT), head_VD.shape[0], chunk_tokens
  )
  dhead_VD = cpu.keep_layout(dhead_DV).T
  if sharded:
    # Each device saw its rows and its part of the vocabulary. The head's gradient leaves as the
    # head's parameter is sharded, a reduce-scatter over fsdp.
    loss = jax.lax.psum(loss, partitioning.BATCH_AXES)
    dhead_VD = jax.lax.psum(dhead_VD, ("dcn", "data"))
    dhead_VD = jax.lax.psum_scatter(dhead_VD, "fsdp", scatter_dimension=1, tiled=True)
    dhidden_BTD = jax.lax.psum(dhidden_BTD, "tensor")
  return loss, dhidden_BTD, dhead_VD


def _softmax(
  sharded: bool, hidden_CD, head_VD, targets_C, weights_C=None
) -> tuple[Array, Array | None]:
  """Returns the nats of each target, and with weights the loss's gradient by the logits."""
  exact = devices.precision(hidden_CD, head_VD)
  logits_CV = jnp.dot(hidden_CD, head_VD.T, precision=exact, preferred_element_type=jnp.float32)
  num_rows = head_VD.shape[0]
  if sharded:  # this device has a part of the vocabulary: count from its first token
    targets_C -= jax.lax.axis_index("tensor") * num_rows
  largest_C = jnp.max(logits_CV, axis=-1)
  if sharded:
    largest_C = jax.lax.pmax(largest_C, "tensor")
  exp_CV = jnp.exp(logits_CV - largest_C[:, None])
  total_C = jnp.sum(exp_CV, axis=-1)
  # One device holds the target's logit; the others add 0.
  is_here_C = (targets_C >= 0) & (targets_C < num_rows)
  rows_C = jnp.clip(targets_C, 0, num_rows - 1)
  target_C = jnp.take_along_axis(logits_CV, rows_C[:, None], axis=1)[:, 0]
  target_C = jnp.where(is_here_C, target_C, 0.0)
  if sharded:
    total_C, target_C = jax.lax.psum((total_C, target_C), "tensor")
  nll_C = jnp.log(total_C) + largest_C - target_C
  if weights_C is None:
    return nll_C, None
  # d nll / d logits = softmax - one_hot(target); the exponentials above are used again.
  is_target_CV = jax.lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1) == targets_C[:, None]
  scale_C = weights_C / total_C
  dlogits_CV = exp_CV * scale_C[:, None] - jnp.where(is_target_CV, weights_C[:, None], 0.0)
  return nll_C, dlogits_CV


def _scan_chunks(
  chunk: Callable[..., Any], carry: Any, parts: tuple[Array, ...], vocab_size: int, chunk_tokens
) -> tuple[Any, Array]:
  """Scans over chunks of the tokens of [B, T, ..] arrays; the stacked result is [B, T, ..] too."""
  B, T = parts[0].shape[:2]
  size = min(chunk_tokens or max(_CHUNK_BYTES // (4 * vocab_size), 1), B * T)
  num_chunks = -(-B * T // size)
  size = -(-B * T // num_chunks)  # chunks of even size, of whole tiles of 128
  if size > 128:
    size = min(-(-size // 128) * 128, B * T)
    num_chunks = -(-B * T // size)
  padding = num_chunks * size - B * T

  def split(x: Array) -> Array:
    x = x.reshape(B * T, *x.shape[2:])
    # Padding has weight 0, and `stacked` is cut to B * T.
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(num_chunks, size, *x.shape[1:])

  if num_chunks == 1:
    carry, stacked = chunk(carry, jax.tree.map(lambda x: x.reshape(B * T, *x.shape[2:]), parts))
  else:
    carry, stacked = jax.lax.scan(chunk, carry, jax.tree.map(split, parts))
    stacked = stacked.reshape(num_chunks * size, *stacked.shape[2:])[: B * T]
  return carry, stacked.reshape(B, T, *stacked.shape[1:])
