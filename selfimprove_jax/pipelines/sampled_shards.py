"""Sampling at scale: shards of requests to shards of records, by every process of a job.

A shard is the unit of resumption. Each process has an engine on its own devices and samples every
so-manieth shard, so nothing but the end is agreed on; what is written is the same for any number of
processes. The engine has begun with a process's next shard while the last texts of one are drawn.
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from selfimprove_jax import distributed
from selfimprove_jax.pipelines.stages import Context
from selfimprove_jax.progress import Bar
from selfimprove_jax.sampling.engine import Engine
from selfimprove_jax.sampling.requests import Completion, Request
from selfimprove_jax.training import preemption

MakeRecord = Callable[[int, int, Request, Completion], dict[str, Any]]
"""(shard, place in it, request, completion) -> record, with `num_tokens` and `finish_reason`."""


def write_shards(
  context: Context,
  *,
  make_engine: Callable[[], Engine],
  requests: Callable[[int], Sequence[Request]],
  make_record: MakeRecord,
  max_shards: int,
  target_tokens: int,
) -> collections.Counter[str]:
  """Samples shards in order until their records hold `target_tokens` new tokens.

  Args:
    make_engine: of this process; not called where every shard is there already.
    requests: shard -> what is sampled for it.

  Returns:
    Sums over the records: `documents`, `tokens`, `prompt_tokens`, and how many ended by each
    `finish_reason` under "finish/REASON".

  Raises:
    ValueError: `max_shards` hold fewer tokens.
    preemption.Preempted: SIGTERM came; whole shards are kept.
  """
  writer = context.writer
  totals: collections.Counter[str] = collections.Counter()
  index, count = jax.process_index(), jax.process_count()
  mine = (s for s in range(index, max_shards, count) if not writer.has_contributed(_name(s)))

  def leave_if_asked(round_number: int) -> None:
    if preemption.requested(round_number):
      raise preemption.Preempted(f"{context.name}: stopped, whole shards are kept")

  with (
    context.progress.track(target_tokens, label=context.name, unit="tokens") as bar,
    contextlib.closing(_Sampled(make_engine, requests, mine, bar)) as sampled,
  ):
    if count == 1:  # several look up together, between shards
      sampled.on_call = lambda: leave_if_asked(0)
    for first in range(0, max_shards, count):
      leave_if_asked(first // count)
      if first + index < max_shards:
        own = first + index
        writer.contribute_jsonl(_name(own), sampled.records(own, make_record))
      distributed.barrier("shards are sampled")
      for shard in range(first, min(first + count, max_shards)):
        take_in = functools.partial(writer.take_in, _name(shard), count=_counts)
        counts = distributed.from_main(take_in)
        totals.update(counts)
        if shard % count != index:  # of its own a process has told as they were drawn
          bar.update(counts["tokens"])
        if totals["tokens"] >= target_tokens:
          break
      if totals["tokens"] >= target_tokens:
        break
  if distributed.is_main():
    writer.discard_contributed()
  totals["documents"] = totals.pop("records", 0)
  if totals["tokens"] < target_tokens:
    raise ValueError(
      f"{max_shards} shards ({totals['documents']} documents) hold {totals['tokens']} tokens, "
      f"target_tokens={target_tokens} were asked for; raise max_shards"
    )
  return totals


def _name(shard: int) -> str:
  return f"{shard:05d}.jsonl"


def _counts(record: dict[str, Any]) -> dict[str, int]:
  return {
    "tokens": record["num_tokens"],
    "prompt_tokens": record["num_prompt_tokens"],
    f"finish/{record['finish_reason']}": 1,
  }


class _Sampled:
  """Completions of this process's shards, in the order of the shards."""

  def __init__(
    self,
    make_engine: Callable[[], Engine],
    requests: Callable[[int], Sequence[Request]],
    shards: Iterator[int],
    bar: Bar,
  ):
    self._make_engine, self._requests, self._shards, self._bar = make_engine, requests, shards, bar
    self._places: list[tuple[int, int]] = []  # of each request of the stream: shard, place in it
    self._begun: dict[int, Sequence[Request]] = {}
    self._ended: dict[int, dict[int, Completion]] = collections.defaultdict(dict)
    self._stream: Iterator[tuple[int, Completion]] | None = None
    self.on_call: Callable[[], None] = lambda: None

  def records(self, shard: int, make_record: MakeRecord) -> Iterator[dict[str, Any]]:
    """The records of a shard; the shards before it must have been asked for, or be there."""
    if self._stream is None:
      self._stream = self._open()
    while shard not in self._begun or len(self._ended[shard]) < len(self._begun[shard]):
      number, completion = next(self._stream)
      of_shard, place = self._places[number]
      self._ended[of_shard][place] = completion
    requests, ended = self._begun.pop(shard), self._ended.pop(shard)
    for place, request in enumerate(requests):
      yield make_record(shard, place, request, ended[place])

  def close(self) -> None:
    if self._stream is not None:
      self._stream.close()

  def _open(self):
    engine = self._make_engine()

    def on_tokens(num_tokens):
      counts = engine.stats()
      reasons = {name: counts[name] for name in ("stop", "length", "error") if name in counts}
      self._bar.update(num_tokens, **reasons)
      self.on_call()

    return engine.stream(self._all_requests(), on_tokens=on_tokens)

  def _all_requests(self):
    for shard in self._shards:
      self._begun[shard] = self._requests(shard)
      for place, request in enumerate(self._begun[shard]):
        self._places.append((shard, place))
        yield request
