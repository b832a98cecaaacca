"""Next-token loss on packed rows."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def next_token_nll(
  logits_BTV: Float[Array, "B T V"], tokens_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
  """Nats of each token given what precedes it in its row; 0 for the first, which nothing precedes.

  Entry t belongs to the token at t (predicted at t - 1), so it lines up with the row's `loss_mask`.
  """
  # The last position predicts past the row; its term is rolled to the front and zeroed there, which
  # is cheaper than slicing the logits.
  nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, jnp.roll(tokens_BT, -1, 1))
  return jnp.roll(nll_BT, 1, axis=1).at[:, 0].set(0.0)


def loss_sum_and_tokens(
  logits_BTV: Float[Array, "B T V"],
  tokens_BT: Int[Array, "B T"],
  loss_mask_BT: Bool[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Summed nats over the target tokens, and their number.

  Packing never marks the first token of a document as a target, so no document is predicted from
  the one before it.
  """
  weights_BT = loss_mask_BT.astype(jnp.float32)
  return jnp.sum(next_token_nll(logits_BTV, tokens_BT) * weights_BT), jnp.sum(weights_BT)
