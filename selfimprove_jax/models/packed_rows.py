"""Rows of different lengths whose tokens stand one after another, without padding between them.

Everything but attention takes tokens one by one, so only attention lays the rows out, padded to one
length. Packed documents of training (`segments_BT`) are rows too, but see no cache; these may.

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
    positions_RC: of every place of a row. Those behind its last token go on counting, so that no
      token of the row looks at them.
    places_BT: row * C + column of each token, rows counted from the sequence's first; P if it is
      padding.
    sources_BP: the token of each place; T for places behind the last token.
  """

  positions_RC: Int[Array | np.ndarray, "R C"]
  places_BT: Int[Array | np.ndarray, "B T"]
  sources_BP: Int[Array | np.ndarray, "B P"]

  def lay_out(self, x_BT: Shaped[Array, "B T *E"]) -> Shaped[Array, "R C *E"]:
    """Returns what belongs to tokens in rows; 0 behind the last token of a row."""
    return _take(x_BT, self.sources_BP).reshape(*self.positions_RC.shape, *x_BT.shape[2:])

  def pack(self, x_RC: Shaped[Array, "R C *E"]) -> Shaped[Array, "B T *E"]:
    """Returns what belongs to places of rows in packed sequences; 0 for padding."""
    return _take(x_RC.reshape(*self.sources_BP.shape, *x_RC.shape[2:]), self.places_BT)


def _take(x_BN: Array, at_BM: Array) -> Array:
  return jax.vmap(lambda x_N, at_M: x_N.at[at_M].get(mode="fill", fill_value=0))(x_BN, at_BM)
