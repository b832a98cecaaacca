"""Batches from several sources of rows by weight; the whole state of the data is the step.

Batch `step` is a function of the sources, weights, seed and step alone. Every host computes its own
part of it, and the parts laid end to end are the same rows for any number of hosts.
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

# grain's shuffle needs no memory, but walks through 2**16 numbers for one of fewer rows.
_SORTED_BELOW = 1 << 16


@dataclasses.dataclass(frozen=True)
class Component:
  """A source of rows and its share.

  Attributes:
    weight: Rows drawn from it are this over the sum of all weights.
    repeat: Begin again, in another order, when all rows were seen; else the mixture may never ask
      for more rows than there are.
  """

  name: str
  source: rows.RowSource
  weight: float
  repeat: bool


class Mixture:
  """`num_steps` batches of `batch_size` rows drawn from components."""

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
    """Checks that there are rows enough; reads none.

    Each component is shuffled by the seed and its name, anew in every pass.

    Args:
      batch_size: Rows of a step over all hosts.
      num_steps: Steps of the run; a longer run begins with the same batches.
      process_index: This host, which gets that part of each batch, of `process_count`.

    Raises:
      ValueError: a component that may not repeat has fewer rows than its share of the run; or
        components are empty, of different row lengths, of one name or without positive weight;
        or the batch does not divide over the hosts.
    """
    _check_components(components)
    if batch_size % process_count or not 0 <= process_index < process_count:
      raise ValueError(
        f"batch_size {batch_size} must divide over {process_count} hosts; this is {process_index}"
      )
    self.components = tuple(components)
    self.batch_size = batch_size
    self.num_steps = num_steps
    self._rows_per_process = batch_size // process_count
    self._process = process_index, process_count
    self._turns = _Turns([c.weight for c in components])
    self._check_enough()
    self._seeds = [_seed32(seed, component.name) for component in components]

  def batch(self, step: int) -> packing.Batch:
    """This host's rows of a step.

    Raises:
      IndexError: the step is not one of the run's.
    """
    if not 0 <= step < self.num_steps:
      raise IndexError(f"step {step} of a mixture of {self.num_steps} steps")
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
    """(step, batch) of `num_steps` steps from `start_step`, made ahead in one thread.

    An error in a batch is raised when its step is due. The thread ends with the iterator, also
    when that is closed early.

    Args:
      prefetch: Batches made ahead, at least 1.
    """
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
    """Rows drawn from each component, repeats counted, in the first `num_steps` steps."""
    counts = self._turns.counts(num_steps * self.batch_size)
    return {component.name: count for component, count in zip(self.components, counts)}

  def passes(self, num_steps: int) -> dict[str, float]:
    """How often each component's rows were seen, on average, in the first `num_steps` steps."""
    used = self.rows_used(num_steps)
    return {c.name: used[c.name] / len(c.source) for c in self.components}

  def _check_enough(self) -> None:
    used = self.rows_used(self.num_steps)
    for component in self.components:
      have, need = len(component.source), used[component.name]
      if need > have and not component.repeat:
        raise ValueError(
          f"the corpus of {component.name!r} is smaller than the budget asks: {self.num_steps} "
          f"steps of {self.batch_size} rows need {need} of its rows, there are {have}. Give it "
          f"more text, lower its weight ({component.weight}) or the number of steps to "
          f"{have / need:.0%}, or let it repeat"
        )


class _Turns:
  """Whose turn it is: position in the mixture -> (component, number of its row).

  Unlike the weights of grain's `MapDataset.mix`, which are rounded to a percent of the smallest,
  shares are exact to one in a million, and how many rows each component gives is known beforehand.
  """

  def __init__(self, weights: Sequence[float]):
    total = sum(weights)
    self._parts = [max(round(weight / total * 1_000_000), 1) for weight in weights]

  def between(self, begin: int, end: int) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
    """Component and number of its row, for positions from `begin` to before `end`."""
    counts_CN = np.stack(self.counts(np.arange(begin, end + 1)))
    components = np.diff(counts_CN).argmax(0)
    return components, counts_CN[components, np.arange(len(components))]

  def counts(self, num_rows: int | Int64[np.ndarray, "N"]) -> list[int | Int64[np.ndarray, "N"]]:
    """Rows of each component among the first `num_rows`.

    The first component takes its share of all, rounded up, the second its share of what the
    first left, and so on: one more row in all is one more row of exactly one component.
    """
    counts, rest, rest_parts = [], num_rows, sum(self._parts)
    for part in self._parts:
      left = rest * (rest_parts - part) // rest_parts
      counts.append(rest - left)
      rest, rest_parts = left, rest_parts - part
    return counts


def _shuffled(number: int, num_rows: int, seed: int) -> int:
  """Number of a component's row -> its index; each pass over the rows is in another order."""
  number_of_pass, number = divmod(number, num_rows)
  if num_rows < _SORTED_BELOW:
    return int(_sorted_by_chance(num_rows, seed, number_of_pass)[number])
  # As in grain's `MapDataset.shuffle`, the pass is added to the seed; hence seeds far apart
  # (`_seed32`), or neighbouring ones would share their orders.
  return grain_experimental.index_shuffle(
    number, max_index=num_rows - 1, seed=(seed + number_of_pass) % 2**32, rounds=4
  )


@functools.lru_cache(32)
def _sorted_by_chance(num_rows: int, seed: int, number_of_pass: int) -> Int64[np.ndarray, "N"]:
  # numpy promises the same raw bits in every release, but not the same `permutation`.
  bits = np.random.Philox(key=[seed, number_of_pass]).random_raw(num_rows)
  return bits.argsort(kind="stable")


def _seed32(seed: int, name: str) -> int:
  return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=4).digest())


def _check_components(components: Sequence[Component]) -> None:
  names = [component.name for component in components]
  if not names or len(set(names)) < len(names):
    raise ValueError(f"components are named {names}; there must be some, each with its own name")
  for component in components:
    if component.weight <= 0:
      raise ValueError(f"component {component.name!r} has weight {component.weight}; leave it out")
    if not len(component.source):
      raise ValueError(f"component {component.name!r} has no rows")
  lengths = {component.name: component.source.seq_len for component in components}
  if len(set(lengths.values())) > 1:
    raise ValueError(f"components have rows of different lengths: {lengths}")
