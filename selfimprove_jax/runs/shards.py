"""The loop by which the processes of a job make the shards of one artifact."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from selfimprove_jax.runs import artifacts
from selfimprove_jax.runtime import distributed, preemption

Record = dict[str, Any]


class ShardLoop:
  """Deals the shards of an artifact out to the processes of a job, in rounds.

    shards = context.shards(100, count=count_tokens, enough=lambda totals: totals["tokens"] >= 1e6)
    for index in shards:
      shards.write_jsonl(index, sample(index))
    summary = dict(shards.totals)

  Iterating gives the indices that this process has to make: process i of n makes shards i, n + i,
  2n + i, ... without those that an earlier run has made. After each round the main process lists
  the new shards in the artifact, in order. A shard is the unit of resumption, and neither its bytes
  nor the number of shards depend on the number of processes.

  Attributes:
    totals: `records` and the sums of `count`, over the shards that are in the artifact. The same in
      every process.
  """

  def __init__(
    self,
    writer: artifacts.Writer,
    num_shards: int,
    *,
    label: str,
    count: Callable[[Record], Mapping[str, int]] = lambda record: {},
    enough: Callable[[Mapping[str, int]], bool] | None = None,
    on_made_elsewhere: Callable[[Mapping[str, int]], None] = lambda counts: None,
    alone: bool = False,
  ):
    """Prepares the loop.

    Args:
      num_shards: of the artifact, or with `enough` the most that it may have.
      label: names the stage in messages.
      count: record -> what it adds to the totals besides 1 to `records`. The counts of a shard are
        kept in the manifest.
      enough: totals -> whether no more shards are needed; asked after each shard, in order.
      on_made_elsewhere: called with the counts of each shard that another process or an earlier run
        made, for a progress bar.
      alone: this process makes every shard; the others do not take part.
    """
    self.totals: collections.Counter[str] = collections.Counter()
    self._writer = writer
    self._num_shards = num_shards
    self._label = label
    self._count = count
    self._enough = enough
    self._on_made_elsewhere = on_made_elsewhere
    self._alone = alone
    self._index, self._num_processes = jax.process_index(), jax.process_count()
    if alone:
      self._index, self._num_processes = 0, 1

  def __iter__(self) -> Iterator[int]:
    """Yields the indices to make; raises `preemption.Preempted` between rounds after SIGTERM."""
    for first in range(0, self._num_shards, self._num_processes):
      self._leave_if_asked(first // self._num_processes)
      own = first + self._index
      makes = own < self._num_shards and not self._is_made(own)
      if makes:
        yield own
      self._barrier(f"{self._label}: a round of shards is made")
      for index in range(first, min(first + self._num_processes, self._num_shards)):
        counts = self._from_main(lambda: self._list(index))  # noqa: B023, called at once
        self.totals.update(counts)
        if not (makes and index == own):
          self._on_made_elsewhere(counts)
        if self._enough is not None and self._enough(self.totals):
          self._discard_others()
          return

  def upcoming(self) -> Iterator[int]:
    """Yields the indices that iterating will yield, for work ahead of the loop.

    `enough` may end the loop before the last of them.
    """
    for index in range(self._index, self._num_shards, self._num_processes):
      if not self._is_made(index):
        yield index

  def write_jsonl(self, index: int, records: Iterable[Record]) -> None:
    """Writes one shard; it appears whole."""
    self._writer.write_unlisted(self.name(index), records)

  def name(self, index: int) -> str:
    """Returns the file name of a shard."""
    if self._enough is not None:
      return f"{index:05d}.jsonl"
    return artifacts.shard_name(index, self._num_shards)

  def check_preemption(self) -> None:
    """Raises `preemption.Preempted` after SIGTERM, for work that takes long between two shards.

    In a job of several processes it does nothing: these leave together, between rounds.
    """
    if self._num_processes == 1:
      self._leave_if_asked(0)

  def _leave_if_asked(self, round_number: int) -> None:
    if self._num_processes == jax.process_count() and preemption.requested(round_number):
      raise preemption.Preempted(f"{self._label}: stopped, whole shards are kept")

  def _is_made(self, index: int) -> bool:
    # A file that the artifact does not list yet is a shard whose process or whose main process was
    # killed before listing it. Files appear by a rename, so it is whole.
    return (self._writer.folder / self.name(index)).exists()

  def _list(self, index: int) -> dict[str, int]:
    name = self.name(index)
    if not self._writer.has(name):
      counts = collections.Counter(records=0)
      for record in self._writer.read_jsonl(name):
        counts.update(records=1, **self._count(record))
      self._writer.list_shard(name, counts)
    return self._writer.counts(name)

  def _discard_others(self) -> None:
    """Removes shards that were made and turned out not to be needed."""
    if distributed.is_main():
      for path in self._writer.folder.glob("*.jsonl"):
        if path.name[:5].isdigit() and not self._writer.has(path.name):
          path.unlink()

  def _barrier(self, name: str) -> None:
    if not self._alone:
      distributed.barrier(name)

  def _from_main(self, make: Callable[[], dict[str, int]]) -> dict[str, int]:
    return make() if self._alone else distributed.from_main(make)
