"""Draws batches from several sources of rows by weight; the state of the data is the step.

Batch `step` depends only on the sources, weights, seed and step, so a resumed run needs no saved
iterator. Every process computes its own part of a batch; concatenated, the parts are the same rows
for any number of processes.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from grain import experimental as grain_experimental
from jaxtyping import Int64

from selfimprove_jax.data import packing, rows

# grain's shuffle needs no memory, but with fewer than 2**16 rows each lookup costs as much as then.
_SORTED_BELOW = 1 << 16


@dataclasses.dataclass(frozen=True)
class Component:
  """A source of rows and its share of a mixture.

  Attributes:
    weight: its share of the rows is this divided by the sum of all weights.
    repeat: start again, in another order, after all rows were drawn. Otherwise `Mixture` raises
      ValueError if it needs more rows than there are.
  """

  name: str
  source: rows.RowSource
  weight: float
  repeat: bool


class Mixture:
  """Draws `num_steps` batches of `batch_size` rows from components.

  Ours instead of grain's `MapDataset.mix`: shares are exact, the number of rows that a run needs is
  known before it starts, and loading is four times as fast (benchmarks/data.md).
  """

  def __init__(
    self,
    components: Sequence[Component],
    *,
    batch_size: int,
    num_steps: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
  ):
    """Checks that there are enough rows, without reading any.

    The seed and a component's name determine its order, which differs from pass to pass.

    Args:
      batch_size: rows per step over all processes, which must divide it.
      num_steps: steps of the run; a longer run begins with the same batches.
      process_index: which of the `process_count` equal parts of each batch to make.

    Raises:
      ValueError: a component that may not repeat has too few rows; or components are empty, share a
        name, differ in row length or have no positive weight.
    """
    _check_components(components)
    if batch_size % process_count or not 0 <= process_index < process_count:
      raise ValueError(
        f"batch_size={batch_size} must divide over {process_count} processes, of which this is "
        f"number {process_index}"
      )
    self.components = tuple(components)
    self.batch_size = batch_size
    self.num_steps = num_steps
    self._rows_per_process = batch_size // process_count
    self._process = process_index, process_count
    self._turns = _Turns([c.weight for c in components])
    used = self.rows_used(num_steps)
    for component in components:
      have, need = len(component.source), used[component.name]
      if need > have and not component.repeat:
        raise ValueError(
          f"the corpus of {component.name!r} is smaller than the budget asks: {num_steps} steps of "
          f"{batch_size} rows need {need} of its rows, and it has {have}. Give it more text, lower "
          f"its weight ({component.weight}) or the number of steps to {have / need:.0%}, or let it "
          f"repeat"
        )
    self._seeds = [_seed32(seed, component.name) for component in components]

  def batch(self, step: int) -> packing.Batch:
    """Returns this process's rows of a step; raises IndexError beyond the last step."""
    if not 0 <= step < self.num_steps:
      raise IndexError(f"step {step} of a mixture of {self.num_steps} steps")
    # Positions number the rows of the whole run: by step, within a step by process.
    process_index, process_count = self._process
    begin = (step * process_count + process_index) * self._rows_per_process
    turns, numbers = self._turns.between(begin, begin + self._rows_per_process)
    records = []
    for turn, number in zip(turns.tolist(), numbers.tolist()):
      source = self.components[turn].source
      records.append(source.record(_shuffled(number, len(source), self._seeds[turn])))
    return rows.decode(records, self.components[0].source.seq_len)

  def iterate(
    self, start_step: int, *, num_steps: int, prefetch: int = 2
  ) -> Iterator[tuple[int, packing.Batch]]:
    """Yields (step, batch) for `num_steps` steps from `start_step`, prefetched by one thread.

    An error in a batch is raised when its step is due. Closing the iterator ends the thread.

    Args:
      prefetch: batches to make ahead, at least 1.
    """
    # The next batch is submitted before this one is yielded, so it is made while the step computes.
    ahead = iter(range(start_step, start_step + num_steps))
    with concurrent.futures.ThreadPoolExecutor(1, "mixture") as thread:
      pending = collections.deque(
        (step, thread.submit(self.batch, step)) for step in itertools.islice(ahead, prefetch)
      )
      try:
        while pending:
          step, batch = pending.popleft()
          batch = batch.result()
          pending.extend((s, thread.submit(self.batch, s)) for s in itertools.islice(ahead, 1))
          yield step, batch
      finally:
        for _, batch in pending:
          batch.cancel()

  def rows_used(self, num_steps: int) -> dict[str, int]:
    """Counts the rows drawn from each component in the first `num_steps` steps, with repeats."""
    counts = self._turns.counts(num_steps * self.batch_size)
    return {component.name: count for component, count in zip(self.components, counts)}

  def passes(self, num_steps: int) -> dict[str, float]:
    """Returns the mean passes over each component's rows in the first `num_steps` steps."""
    used = self.rows_used(num_steps)
    return {c.name: used[c.name] / len(c.source) for c in self.components}


class _Turns:
  """Maps a position in the mixture to a component and the number of its row.

  Shares are exact to one in a million; grain's `MapDataset.mix` rounds them to a percent of the
  smallest.
  """

  def __init__(self, weights: Sequence[float]):
    total = sum(weights)
    # Integers, since floats would round large positions; at least 1, so that no share rounds to 0.
    self._parts = [max(round(weight / total * 1_000_000), 1) for weight in weights]

  def between(self, begin: int, end: int) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
    """Returns components and row numbers for the positions from `begin` to before `end`."""
    # Each position adds one row to one component, whose count is the one that grows.
    counts_CN = np.stack(self.counts(np.arange(begin, end + 1)))
    components = np.diff(counts_CN).argmax(0)
    return components, counts_CN[components, np.arange(len(components))]

  def counts(self, num_rows: int | Int64[np.ndarray, "N"]) -> list[int | Int64[np.ndarray, "N"]]:
    """Counts the rows of each component among the first `num_rows`.

    The first component gets its share of all rows, rounded up, the second its share of the rest,
    and so on. So one more row in total is one more row of exactly one component, which `between`
    relies on.
    """
    counts, rest, rest_parts = [], num_rows, sum(self._parts)
    for part in self._parts:
      left = rest * (rest_parts - part) // rest_parts
      counts.append(rest - left)
      rest, rest_parts = left, rest_parts - part
    return counts


def _shuffled(number: int, num_rows: int, seed: int) -> int:
  """Maps the number of a component's row to its index; each pass has its own order."""
  number_of_pass, number = divmod(number, num_rows)
  if num_rows < _SORTED_BELOW:
    return int(_permutation(num_rows, seed, number_of_pass)[number])
  # The pass is added to the seed, as in grain's `MapDataset.shuffle`. `_seed32` spreads seeds far
  # apart: with neighboring seeds, one component's second pass would equal another's first.
  return grain_experimental.index_shuffle(
    number, max_index=num_rows - 1, seed=(seed + number_of_pass) % 2**32, rounds=4
  )


@functools.lru_cache(32)
def _permutation(num_rows: int, seed: int, number_of_pass: int) -> Int64[np.ndarray, "N"]:
  # NumPy keeps raw bits the same in every release, but not `permutation`.
  bits = np.random.Philox(key=[seed, number_of_pass]).random_raw(num_rows)
  return bits.argsort(kind="stable")


def _seed32(seed: int, name: str) -> int:
  # By name, so that a component keeps its order when others join or leave the mixture.
  return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=4).digest())


def _check_components(components: Sequence[Component]) -> None:
  names = [component.name for component in components]
  if not names or len(set(names)) < len(names):
    raise ValueError(f"components are named {names}; give at least one, each with its own name")
  for component in components:
    if component.weight <= 0:
      raise ValueError(
        f"component {component.name!r} has weight {component.weight}; make it positive, or leave "
        f"the component out"
      )
    if not len(component.source):
      raise ValueError(f"component {component.name!r} has no rows")
  lengths = {component.name: component.source.seq_len for component in components}
  if len(set(lengths.values())) > 1:
    raise ValueError(f"components have rows of different lengths: {lengths}")
