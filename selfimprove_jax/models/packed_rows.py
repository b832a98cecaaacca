"""Rows of different lengths whose tokens stand one after another, without padding between them.

Every other part of a layer treats tokens independently, so only attention pads the rows to one
length. Unlike the packed documents of training (`segments_BT`), these rows may have a cache.

Axis letters: those of `llama.py`, B packed sequences of T tokens here; R rows of all of them, C
columns of a row, P = C R / B places in the rows of one sequence.
"""

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Int, Shaped


@flax.struct.dataclass
class PackedRows:
  """Where the tokens of packed sequences stand in rows.

  Attributes:
    positions_RC: position of every place of a row. Places after its last token have later
      positions, so no token of the row attends to them.
    places_BT: row * C + column of each token, rows counted from the sequence's first; P if it is
      padding.
    sources_BP: the token of each place; T for places after the last token.
  """

  positions_RC: Int[Array | np.ndarray, "R C"]
  places_BT: Int[Array | np.ndarray, "B T"]
  sources_BP: Int[Array | np.ndarray, "B P"]

  def lay_out(self, x_BT: Shaped[Array, "B T *E"]) -> Shaped[Array, "R C *E"]:
    """Moves values of tokens from packed sequences to rows; 0 after the last token of a row."""
    return _take(x_BT, self.sources_BP).reshape(*self.positions_RC.shape, *x_BT.shape[2:])

  def pack(self, x_RC: Shaped[Array, "R C *E"]) -> Shaped[Array, "B T *E"]:
    """Moves values of tokens from rows to packed sequences; 0 for padding."""
    return _take(x_RC.reshape(*self.sources_BP.shape, *x_RC.shape[2:]), self.places_BT)


def _take(x_BN: Array, at_BM: Array) -> Array:
  return jax.vmap(lambda x_N, at_M: x_N.at[at_M].get(mode="fill", fill_value=0))(x_BN, at_BM)
