"""Asks a language model for the texts of units, and keeps what it answered in a log.

The log has one JSON object a line: the record of a finished unit, or of one whose attempts have all
failed (field `failure`). Its order is deterministic. The first attempts are made in the order of
the units, and their records are written in that order, without those that failed; then those are
asked again, in the same order, and so on. So a failure delays no other unit, each round streams
through one call of `generate`, and memory holds only the failed units of a round.

A process that was killed starts again with the same units. Units in the log are skipped; a failed
attempt that was to be repeated is not in the log, and is made again.
"""

import collections
import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from selfimprove_jax.language_models.protocol import LanguageModel, Reply, TextRequest
from selfimprove_jax.runs import storage
from selfimprove_jax.synthesis.units import BudgetConfig, Unit

_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Counts:
  """What a log holds, and what was asked now.

  All but `num_skipped` and `num_calls` are the same however often a process was killed.

  Attributes:
    num_records: records in the log, failures included.
    num_failures: records of units whose attempts have all failed.
    prompt_tokens, completion_tokens: tokens of the texts in the log, without failed attempts.
    cost_usd: price of the calls of the units in the log, failed attempts included.
    is_spent: whether the budget ended the synthesis.
    num_skipped: units that were in the log already.
    num_calls: calls that were answered now.
  """

  num_records: int = 0
  num_failures: int = 0
  prompt_tokens: int = 0
  completion_tokens: int = 0
  cost_usd: float = 0.0
  is_spent: bool = False
  num_skipped: int = 0
  num_calls: int = 0

  def add(self, record: dict[str, Any], budget: BudgetConfig) -> None:
    """Counts a record of the log."""
    self.num_records += 1
    self.cost_usd += record.get("cost_usd", 0.0)
    if "failure" in record:
      self.num_failures += 1
    else:
      self.prompt_tokens += record["usage"]["prompt_tokens"]
      self.completion_tokens += record["usage"]["completion_tokens"]
    self.is_spent = budget.is_spent(tokens=self.completion_tokens, usd=self.cost_usd)


def answer(
  units: Iterable[Unit],
  *,
  model: LanguageModel,
  make_request: Callable[[Unit, int], TextRequest],
  read: Callable[[Unit, TextRequest, Reply, int], dict[str, Any]],
  log_path: str | os.PathLike,
  max_attempts: int,
  on_reply: Callable[[Reply, dict[str, Any] | None], None] | None = None,
  budget: BudgetConfig | None = None,
) -> Counts:
  """Appends a record of each unit to a log, calling the model for those that it lacks.

  Args:
    units: read as the model needs them; a unit that occurs twice is asked once.
    make_request: makes the request of a unit and an attempt, from 0.
    read: makes the record of a unit, its request, the reply and the attempt; one with the field
      `failure` is written only after `max_attempts` attempts. `cost_usd` is added to it.
    log_path: on a disk, each record is written before the next reply is awaited; in an object
      store, all are written at the end.
    on_reply: called with each reply and the record that was written; None if the unit is asked
      again.
    budget: its `max_tokens` and `max_usd` end the synthesis, so that calls that are in flight then
      are lost; `units.within` applies its other field.

  Raises:
    ValueError: the log is damaged, or `max_attempts` is below 1.
    Exception: what the model raises; the records of all earlier replies are in the log.
  """
  if max_attempts < 1:
    raise ValueError(f"max_attempts is {max_attempts}; it must be at least 1")
  budget = budget or BudgetConfig()
  path = storage.path(log_path)
  counts, ids = Counts(), set()
  for record in _whole_records(path):
    ids.add(record["id"])
    counts.add(record, budget)
  log = storage.LineLog(path)
  try:
    waiting: Iterable[_Waiting] = _missing(units, ids, counts)
    for attempt in range(max_attempts):
      waiting = list(
        _round(
          waiting,
          attempt,
          model=model,
          make_request=make_request,
          read=read,
          log=log,
          is_last=attempt == max_attempts - 1,
          on_reply=on_reply,
          budget=budget,
          counts=counts,
        )
      )
      if not waiting:
        break
  finally:
    log.close()
  return counts


def read_records(log_path: str | os.PathLike) -> Iterator[dict[str, Any]]:
  """Yields the records of a log in order, without a last line that is torn.

  Raises:
    ValueError: while iterating: a line is not a record.
  """
  return (record for _, record in _lines(storage.path(log_path)))


def retry_failures(log_path: str | os.PathLike) -> int:
  """Removes the records of failed units from a log, so that the next run asks for them again.

  Returns:
    The number of records that were removed.
  """
  path = storage.path(log_path)
  if not path.exists():
    return 0
  num_removed = 0
  with storage.replacing(path) as temporary, temporary.open("wb") as kept:
    for line, record in _lines(path):
      if "failure" in record:
        num_removed += 1
      else:
        kept.write(line)
  return num_removed


@dataclasses.dataclass(frozen=True)
class _Waiting:
  """A unit that is to be asked, and the price of its failed attempts."""

  unit: Unit
  cost_usd: float = 0.0


def _missing(units: Iterable[Unit], ids: set[str], counts: Counts) -> Iterator[_Waiting]:
  """Yields the units that a log lacks, each once; adds their ids to `ids`."""
  in_log = frozenset(ids)
  for unit in units:
    if unit.id not in ids:
      ids.add(unit.id)
      yield _Waiting(unit)
    elif unit.id in in_log:
      counts.num_skipped += 1


def _round(
  waiting: Iterable[_Waiting],
  attempt: int,
  *,
  model: LanguageModel,
  make_request: Callable[[Unit, int], TextRequest],
  read: Callable[[Unit, TextRequest, Reply, int], dict[str, Any]],
  log: storage.LineLog,
  is_last: bool,
  on_reply: Callable[[Reply, dict[str, Any] | None], None] | None,
  budget: BudgetConfig,
  counts: Counts,
) -> Iterator[_Waiting]:
  """Asks each unit once, writes the records, and yields the units to be asked again."""
  if counts.is_spent:
    return
  asked: collections.deque[tuple[_Waiting, TextRequest]] = collections.deque()

  def requests() -> Iterator[TextRequest]:
    for one in waiting:
      request = make_request(one.unit, attempt)
      asked.append((one, request))
      yield request

  with contextlib.ExitStack() as stack:
    replies = model.generate(requests())
    if hasattr(replies, "close"):
      stack.callback(replies.close)
    for reply in replies:
      one, request = asked.popleft()
      counts.num_calls += 1
      record = read(one.unit, request, reply, attempt)
      cost_usd = one.cost_usd + reply.cost_usd
      is_written = is_last or "failure" not in record
      if is_written:
        record = {**record, "cost_usd": cost_usd}
        log.write(json.dumps(record) + "\n")
        counts.add(record, budget)
      if on_reply is not None:
        on_reply(reply, record if is_written else None)
      if not is_written:
        yield _Waiting(one.unit, cost_usd)
      if counts.is_spent:
        return
  assert not asked, f"{model.name} left {len(asked)} requests unanswered"


def _whole_records(path: storage.Path) -> Iterator[dict[str, Any]]:
  """Yields the records of a log, and cuts off a last line that is torn."""
  end = 0
  for line, record in _lines(path):
    end += len(line)
    yield record
  if not storage.is_remote(path) and path.exists() and end < path.stat().st_size:
    _logger.warning("%s: the last line is torn, and is removed", path)
    os.truncate(path, end)


def _lines(path: storage.Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
  """Yields each whole line of a log with its record, one at a time."""
  if not path.exists():
    return
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      if not line.endswith(b"\n"):
        return
      try:
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("id"), str):
          raise ValueError("it has no id")
        if "failure" not in record and not isinstance(record.get("usage"), dict):
          raise ValueError("it has neither usage nor failure")
      except (ValueError, RecursionError) as error:
        raise ValueError(
          f"{path}, line {number}, is not a record: {error}; remove the line to ask for it again"
        ) from None
      yield line, record
