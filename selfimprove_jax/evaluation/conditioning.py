"""The conditioning gap: how much of d1 the synthesizer uses when it writes d2."""

import numpy as np
from jaxtyping import Float64, Int64

from selfimprove_jax.evaluation import statistics


def conditioning_gap(
  true_nll_sums: Float64[np.ndarray, "N"],
  random_nll_sums: Float64[np.ndarray, "N"],
  token_counts: Int64[np.ndarray, "N"],
  *,
  gate: float,
) -> dict:
  """Held-out NLL of d2 given another document, minus given its neighbour d1, in nats per token.

  A synthesizer with no gap writes unconditional samples, and SBP can then gain no more than those.
  Not a number of the SBP paper, which reports the relevance of pairs instead.

  Args:
    true_nll_sums: nats of each held-out d2 after its true neighbour.
    random_nll_sums: of the same d2, in the same order, after a random d1.
    gate: nats per token below which the report warns.
  """
  gap = statistics.paired_difference(random_nll_sums, true_nll_sums, token_counts)
  return {
    "true_nll": statistics.weighted_mean(true_nll_sums, token_counts).value,
    "random_nll": statistics.weighted_mean(random_nll_sums, token_counts).value,
    "gap": gap.to_dict(),
    "gate": gate,
    "num_pairs": len(token_counts),
  }
