"""EntiGraph's toy model of synthetic continued pretraining (arXiv 2409.07431, section 6).

Axis letters: V entities, S steps at which accuracy is measured.

M0 is a random directed graph of V entities; each edge exists with probability p = lambda / V. A
step draws an ordered pair (x, y), searches M0 breadth-first from x and, if it reaches y, adds an
edge from x to every entity on the path. The model knows a pair if it is an edge. Accuracy is the
share of the V(V - 1) pairs that it knows. Proofs are in appendix G of the paper.

The paper does not say which of several shortest paths is found. Here a search visits the neighbors
of an entity by rising number, and keeps the first path.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

NEVER = np.iinfo(np.int64).max


@dataclasses.dataclass(frozen=True, eq=False)
class SourceGraph:
  """The source knowledge M0; `edges_VV[x, y]` tells whether x points to y."""

  edges_VV: Bool[np.ndarray, "V V"]

  def __post_init__(self) -> None:
    shape = self.edges_VV.shape
    if len(shape) != 2 or shape[0] != shape[1] or self.edges_VV.diagonal().any():
      raise ValueError(f"edges of shape {shape} must be square, without edges to oneself")

  @classmethod
  def random(cls, num_entities: int, p: float, seed: int) -> "SourceGraph":
    """Draws a graph whose edges exist independently with probability `p`."""
    edges_VV = np.random.default_rng(seed).random((num_entities, num_entities)) < p
    np.fill_diagonal(edges_VV, False)
    return cls(edges_VV)

  @property
  def num_pairs(self) -> int:
    return len(self.edges_VV) * (len(self.edges_VV) - 1)

  @property
  def source_accuracy(self) -> float:
    """Accuracy before the first step: the share of the pairs that are edges."""
    return float(self.edges_VV.sum() / self.num_pairs)

  @property
  def reachable_share(self) -> float:
    """Share of the pairs that a path joins: the limit of accuracy."""
    return float((self.depths > 0).sum() / self.num_pairs)

  @functools.cached_property
  def _search(self) -> tuple[np.ndarray, np.ndarray]:
    neighbors = [np.flatnonzero(row).tolist() for row in self.edges_VV]
    parents_VV = np.full(self.edges_VV.shape, -1)
    depths_VV = np.full(self.edges_VV.shape, -1)
    for root, (parents_V, depths_V) in enumerate(zip(parents_VV, depths_VV, strict=True)):
      depths_V[root] = 0
      queue = collections.deque([root])
      while queue:
        x = queue.popleft()
        for y in neighbors[x]:
          if depths_V[y] < 0:
            parents_V[y], depths_V[y] = x, depths_V[x] + 1
            queue.append(y)
    return parents_VV, depths_VV

  @property
  def parents(self) -> Int[np.ndarray, "V V"]:
    """The entity before y on the path from x to y; -1 if there is none."""
    return self._search[0]

  @property
  def depths(self) -> Int[np.ndarray, "V V"]:
    """Edges on the path from x to y; -1 if there is no path."""
    return self._search[1]

  @functools.cached_property
  def covering(self) -> Int[np.ndarray, "V V"]:
    """How many of the pairs (x, .) add the edge (x, y) when they are drawn.

    It is the number of descendants of y, y included, in the tree of the search from x. Divided by
    V(V - 1) it is the paper's q.
    """
    covering_VV = (self.depths > 0).astype(np.int64)
    for depth in range(self.depths.max(), 1, -1):
      x, y = np.nonzero(self.depths == depth)
      np.add.at(covering_VV, (x, self.parents[x, y]), covering_VV[x, y])
    return covering_VV


def simulate(graph: SourceGraph, num_steps: int, seed: int) -> Int[np.ndarray, "V V"]:
  """Runs the toy model; returns the step at which the model learned each pair.

  A pair of the source was learned at step 0; one that the model did not learn has `NEVER`.
  """
  num_entities = len(graph.edges_VV)
  learned_VV = np.where(graph.edges_VV, 0, NEVER)
  draws = np.random.default_rng(seed).integers(graph.num_pairs, size=num_steps)
  # A pair that was drawn before adds no edge.
  pairs, first = np.unique(draws, return_index=True)
  order = np.argsort(first)
  for pair, step in zip(pairs[order].tolist(), (first[order] + 1).tolist(), strict=True):
    x, y = divmod(pair, num_entities - 1)
    y += y >= x  # numbers the entities other than x
    while y != x and (before := graph.parents[x, y]) >= 0:
      learned_VV[x, y] = min(learned_VV[x, y], step)
      y = before
  return learned_VV


def accuracy_of(learned_VV: Int[np.ndarray, "V V"], steps_S: Sequence[int]) -> np.ndarray:
  """Returns the accuracy after each number of steps, of one run of `simulate`."""
  num_pairs = len(learned_VV) * (len(learned_VV) - 1)
  ordered = np.sort(learned_VV, axis=None)
  return np.searchsorted(ordered, steps_S, side="right") / num_pairs


def exact_accuracy(graph: SourceGraph, steps_S: Sequence[int]) -> Float[np.ndarray, "S"]:
  """Returns the expectation of accuracy over the draws, given the graph (appendix G)."""
  num_learnable = np.bincount(graph.covering[~graph.edges_VV])
  num_learnable[0] = 0  # pairs that no path joins
  k = np.flatnonzero(num_learnable)
  missed_SK = (1 - k / graph.num_pairs) ** np.asarray(steps_S, np.float64)[:, None]
  return graph.source_accuracy + (1 - missed_SK) @ num_learnable[k] / graph.num_pairs


def extinction_probability(mean_children: float) -> float:
  """Returns the probability that a Poisson branching process ends, the paper's rho(lambda)."""
  from scipy.special import lambertw

  if mean_children <= 1:
    return 1.0
  return float(-lambertw(-mean_children * np.exp(-mean_children)).real / mean_children)


def reachable_limit(mean_degree: float) -> float:
  """Returns C_lambda, the share of the pairs that a path joins in a large graph."""
  return (1 - extinction_probability(mean_degree)) ** 2


def bounds(
  num_entities: int, mean_degree: float, steps_S: Sequence[int], epsilon: float
) -> tuple[Float[np.ndarray, "S"], Float[np.ndarray, "S"]]:
  """Returns the lower and the upper bound of Theorem 1.

  For any epsilon > 0 they hold with a probability that tends to 1 as the graph grows.

  Raises:
    ValueError: `mean_degree`, the paper's lambda, is not above 1.
  """
  if mean_degree <= 1:
    raise ValueError(f"mean_degree={mean_degree} must be above 1")
  num_pairs = num_entities * (num_entities - 1)
  steps = np.asarray(steps_S, np.float64)
  p, limit = mean_degree / num_entities, reachable_limit(mean_degree)
  c_lb = 1 - 1 / num_pairs
  c_ub = 1 - (1 + epsilon) * np.log(num_entities) / (num_pairs * np.log(mean_degree))
  lower = (p + limit * (1 - c_lb**steps)) * (1 - epsilon)
  upper = (p + limit * (1 - c_ub**steps)) * (1 + epsilon)
  return lower, upper


def smallest_epsilons(
  num_entities: int, mean_degree: float, steps_S: Sequence[int], accuracy_S: np.ndarray
) -> tuple[float, float]:
  """Returns the smallest epsilon for which each bound, lower and upper, holds at all steps."""
  from scipy.optimize import brentq

  lower, _ = bounds(num_entities, mean_degree, steps_S, 0.0)

  def room_above(epsilon: float) -> float:
    return float((bounds(num_entities, mean_degree, steps_S, epsilon)[1] - accuracy_S).min())

  above = 0.0 if room_above(0.0) >= 0 else brentq(room_above, 0.0, 10.0)
  return max(0.0, float((1 - accuracy_S / lower).max())), above


def branching_accuracy(
  num_entities: int, mean_degree: float, steps_S: Sequence[int]
) -> Float[np.ndarray, "S"]:
  """Returns the approximation of accuracy by Poisson branching processes (section 6).

  A pair's covering draws are about the total progeny of l generations, where l is distributed as
  (lambda - 1) / lambda^(l + 1). Approximates (1 - k / n)^t by s^k with s = (1 - 1 / n)^t, so that
  the sum over k is the generating function of the progeny: f_0(s) = s, f_(l+1)(s) =
  s exp(lambda (f_l(s) - 1)). It is up to 0.05 below the exact accuracy at V = 500.
  """
  num_pairs = num_entities * (num_entities - 1)
  s = (1 - 1 / num_pairs) ** np.asarray(steps_S, np.float64)
  missed, progeny, weight = np.zeros_like(s), s, 1 - 1 / mean_degree
  while weight > 1e-12:
    missed += weight * progeny
    progeny, weight = s * np.exp(mean_degree * (progeny - 1)), weight / mean_degree
  return mean_degree / num_entities + reachable_limit(mean_degree) * (1 - missed)


@dataclasses.dataclass(frozen=True)
class Regimes:
  """Where accuracy grows linearly, like a logarithm, and no more; steps are in units of V(V - 1).

  Attributes:
    linear_until: the gain is above 90% of the initial slope times the steps.
    flat_from: the gain is above 90% of its limit.
    log_r2: R^2 of a line in the logarithm of the steps between the two, and how much of the limit
      of the gain is the largest difference to that line.
  """

  linear_until: float
  flat_from: float
  log_r2: float
  log_largest_error: float


def find_regimes(graph: SourceGraph) -> Regimes:
  """Finds the three regimes of section 6 in the exact accuracy of a graph."""
  scaled_S = np.geomspace(1e-3, 1e2, 2001)
  gain_S = exact_accuracy(graph, scaled_S * graph.num_pairs) - graph.source_accuracy
  slope = graph.covering[~graph.edges_VV].sum() / graph.num_pairs
  total = graph.reachable_share - graph.source_accuracy
  linear = int(np.argmax(gain_S < 0.9 * slope * scaled_S))
  flat = int(np.argmax(gain_S > 0.9 * total))
  between = slice(linear, flat + 1)
  line = np.polyfit(np.log(scaled_S[between]), gain_S[between], 1)
  error = gain_S[between] - np.polyval(line, np.log(scaled_S[between]))
  return Regimes(
    linear_until=float(scaled_S[linear]),
    flat_from=float(scaled_S[flat]),
    log_r2=float(1 - error.var() / gain_S[between].var()),
    log_largest_error=float(np.abs(error).max() / total),
  )


# ---- The fit of a sum of exponentials to a measured curve


@dataclasses.dataclass(frozen=True)
class ExponentialFit:
  """The curve y(x) = a - b1 r1^x - b2 r2^x - b3 r3^x; the slowest exponential comes first.

  Attributes:
    a_error: standard error of the limit `a`; None if it is not known.
  """

  a: float
  b: tuple[float, ...]
  r: tuple[float, ...]
  a_error: float | None = None

  def __call__(self, x: Sequence[float]) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return self.a - sum(b * r**x for b, r in zip(self.b, self.r, strict=True))


def fit_exponentials(x: Sequence[float], y: Sequence[float]) -> ExponentialFit:
  """Fits three exponentials by non-linear least squares (section 6.3).

  Starts from rates that are spread over the range of x; amplitudes and rates stay positive.
  """
  from scipy.optimize import curve_fit

  def curve(x, a, b1, b2, b3, log_k1, log_k2, log_k3):
    rates = np.exp([log_k1, log_k2, log_k3])
    return a - np.array([b1, b2, b3]) @ np.exp(-rates[:, None] * x)

  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  rise = y.max() - y.min()
  log_k = np.log(1 / np.quantile(x, [1.0, 0.5, 0.1]))
  start = (y.max(), *(rise / 3,) * 3, *log_k)
  low = (-np.inf, *(0.0,) * 3, *(-np.inf,) * 3)
  found, covariance = curve_fit(curve, x, y, start, bounds=(low, np.inf), max_nfev=20_000)
  a, b, k = found[0], found[1:4], np.exp(found[4:])
  order = np.argsort(k)
  b, r = tuple(b[order].tolist()), tuple(np.exp(-k[order]).tolist())
  return ExponentialFit(float(a), b, r, a_error=float(covariance[0, 0] ** 0.5))
