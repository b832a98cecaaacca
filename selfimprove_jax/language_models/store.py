"""The cache of paid answers and the ledger of their prices, in one SQLite file.

An answer and its price are written in one transaction, so neither exists without the other. A call
is entered before it is made, at its highest possible price. If the process dies or the answer is
lost, the entry stays at that price, since the call may have been billed.
"""

import contextlib
import dataclasses
import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterator

from selfimprove_jax.language_models.protocol import TokenLogprob, Usage
from selfimprove_jax.runs import storage

_NANO = 10**9  # prices are integers in billionths of a dollar, so that sums are exact
_LAYOUT = """
CREATE TABLE IF NOT EXISTS answers (
  key TEXT PRIMARY KEY, model TEXT NOT NULL, answer TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS calls (
  id INTEGER PRIMARY KEY, key TEXT NOT NULL, model TEXT NOT NULL, began REAL NOT NULL, ended REAL,
  state TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
  estimated INTEGER NOT NULL, cost_nano_usd INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS total (id INTEGER PRIMARY KEY CHECK (id = 0), cost_nano_usd INTEGER);
INSERT OR IGNORE INTO total VALUES (0, 0);
"""


class BudgetError(RuntimeError):
  """The rest of the hard cap may not cover the next call.

  Attributes:
    calls_in_flight: whether this process has calls in flight, which may turn out cheaper.
  """

  def __init__(self, message: str, *, calls_in_flight: bool) -> None:
    super().__init__(message)
    self.calls_in_flight = calls_in_flight


@dataclasses.dataclass(frozen=True)
class Answer:
  """A model's answer to one call, and its price; a score has log-probabilities and no text."""

  text: str
  finish_reason: str
  usage: Usage
  cost_usd: float
  logprobs: tuple[TokenLogprob, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Totals:
  """Sums over all calls in the ledger, of all runs.

  Attributes:
    uncertain_calls, uncertain_usd: calls in flight, calls whose answer was lost, and calls of
      processes that were killed, at their highest possible price.
    estimated_calls: paid calls whose tokens were counted on this side.
  """

  paid_calls: int
  prompt_tokens: int
  completion_tokens: int
  paid_usd: float
  uncertain_calls: int
  uncertain_usd: float
  estimated_calls: int


class CallStore:
  """A cache of answers and a ledger with a hard cap, for any number of threads and processes."""

  def __init__(self, path: str | os.PathLike, *, max_usd: float | None) -> None:
    """Opens the file, which must be on a local disk, or creates it.

    Args:
      max_usd: hard cap on the price of all calls in this file, earlier runs included; None for no
        cap.
    """
    if storage.is_remote(path):
      raise ValueError(f"{os.fspath(path)} is in an object store; SQLite needs a disk")
    if max_usd is not None and max_usd < 0:
      raise ValueError(f"max_usd is {max_usd}; it must be at least 0, or None for no cap")
    self.path = storage.path(path)
    self._max_nano = None if max_usd is None else math.floor(max_usd * _NANO)
    self._lock = threading.Lock()
    self._open: set[int] = set()
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
    # A write-ahead log lets other processes read during a write. FULL syncs each commit to disk:
    # with less, a power failure could lose an answer that was paid for.
    self._db.execute("PRAGMA journal_mode=WAL")
    self._db.execute("PRAGMA synchronous=FULL")
    self._db.executescript(_LAYOUT)

  def find(self, key: str) -> Answer | None:
    """Returns the answer that was paid for, or None."""
    with self._lock:
      row = self._db.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
    if row is None:
      return None
    values = json.loads(row[0])
    values["usage"] = Usage(**values["usage"])
    if values.get("logprobs") is not None:
      values["logprobs"] = tuple(map(TokenLogprob.from_json, values["logprobs"]))
    return Answer(**values)

  def begin(self, key: str, *, model: str, most_usd: float) -> int:
    """Enters a call that is about to be made; returns its number.

    Raises:
      BudgetError: less than `most_usd` is left of the cap.
    """
    nano = math.ceil(most_usd * _NANO)
    with self._transaction() as db:
      [taken] = db.execute("SELECT cost_nano_usd FROM total").fetchone()
      if self._max_nano is not None and taken + nano > self._max_nano:
        raise BudgetError(
          f"a call to {model} may cost {most_usd:.6g} USD; {taken / _NANO:.6g} of the cap of "
          f"{self._max_nano / _NANO:.6g} USD are spent or reserved for calls in flight "
          f"({self.path}). Paid answers are kept: raise max_usd and run again to continue.",
          calls_in_flight=bool(self._open),
        )
      call = _insert(db, key, model, "open", Usage(0, 0), nano)
      self._open.add(call)
      return call

  def paid(self, call: int, answer: Answer) -> Answer:
    """Stores the answer to a call with its price; returns the answer that is kept for its key.

    It is an earlier one if another process made the same request in the meantime.
    """
    with self._transaction() as db:
      [key, model] = db.execute("SELECT key, model FROM calls WHERE id = ?", (call,)).fetchone()
      _keep(db, key, model, answer)
      self._end(db, call, "paid", answer.usage, math.ceil(answer.cost_usd * _NANO))
    return self.find(key)

  def not_billed(self, call: int) -> None:
    """Ends a call that was refused or never arrived, at no price."""
    with self._transaction() as db:
      self._end(db, call, "refused", Usage(0, 0), 0)

  def lost(self, call: int) -> None:
    """Ends a call whose answer was lost; it stays at its highest possible price."""
    with self._transaction() as db:
      db.execute("UPDATE calls SET state = 'lost', ended = ? WHERE id = ?", (time.time(), call))
      self._open.discard(call)

  def add(self, key: str, answer: Answer, *, model: str) -> bool:
    """Stores an answer that was paid for elsewhere; returns False if the key has one already."""
    with self._transaction() as db:
      if not _keep(db, key, model, answer):
        return False
      _insert(db, key, model, "paid", answer.usage, math.ceil(answer.cost_usd * _NANO))
      return True

  def totals(self) -> Totals:
    """Returns the sums over all calls so far."""
    with self._lock:
      rows = self._db.execute(
        "SELECT state = 'paid', COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), "
        "SUM(cost_nano_usd), SUM(estimated) FROM calls WHERE state != 'refused' GROUP BY 1"
      ).fetchall()
    by_state = {is_paid: sums for is_paid, *sums in rows}
    calls, prompt, completion, nano, estimated = by_state.get(1, (0,) * 5)
    uncertain_calls, _, _, uncertain_nano, _ = by_state.get(0, (0,) * 5)
    return Totals(
      calls, prompt, completion, nano / _NANO, uncertain_calls, uncertain_nano / _NANO, estimated
    )

  def close(self) -> None:
    """Closes the file."""
    with self._lock:
      self._db.close()

  @contextlib.contextmanager
  def _transaction(self) -> Iterator[sqlite3.Connection]:
    with self._lock:
      # IMMEDIATE takes the write lock before the first read, so that no other process can spend
      # the same dollars between reading the total and adding to it.
      self._db.execute("BEGIN IMMEDIATE")
      try:
        yield self._db
      except BaseException:
        self._db.execute("ROLLBACK")
        raise
      self._db.execute("COMMIT")

  def _end(self, db: sqlite3.Connection, call: int, state: str, usage: Usage, nano: int) -> None:
    [before] = db.execute("SELECT cost_nano_usd FROM calls WHERE id = ?", (call,)).fetchone()
    db.execute(
      "UPDATE calls SET state = ?, ended = ?, prompt_tokens = ?, completion_tokens = ?, "
      "estimated = ?, cost_nano_usd = ? WHERE id = ?",
      (state, time.time(), *dataclasses.astuple(usage), nano, call),
    )
    db.execute("UPDATE total SET cost_nano_usd = cost_nano_usd + ?", (nano - before,))
    self._open.discard(call)


def _keep(db: sqlite3.Connection, key: str, model: str, answer: Answer) -> bool:
  """Stores an answer unless its key has one; returns whether it was stored."""
  text = json.dumps(dataclasses.asdict(answer))
  added = db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (key, model, text))
  return added.rowcount == 1


def _insert(
  db: sqlite3.Connection, key: str, model: str, state: str, usage: Usage, nano: int
) -> int:
  """Enters a call, which has ended unless it is open; returns its number."""
  now = time.time()
  ended = None if state == "open" else now
  values = (key, model, now, ended, state, *dataclasses.astuple(usage), nano)
  row = db.execute(f"INSERT INTO calls VALUES (NULL{', ?' * len(values)})", values)
  db.execute("UPDATE total SET cost_nano_usd = cost_nano_usd + ?", (nano,))
  return row.lastrowid
