"""What was asked of paid models, what they answered and what it cost: one SQLite file.

It is both the request cache and the ledger, so that an answer and its price are written in one
transaction: no answer is paid for and lost, and none is there unpaid. A call is written before it
is made, at the most that it may cost; if the process dies, or the answer is lost on its way, it
stays in the ledger at that price, since it may have been billed.
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

from selfimprove_jax import storage
from selfimprove_jax.language_models.protocol import Usage

_NANO = 10**9  # money is kept in billionths of a dollar, in integers, so that sums are exact
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
  """The next call may cost more than is left of the hard cap.

  Attributes:
    calls_under_way: of this process; when they have ended there may be more left.
  """

  def __init__(self, message: str, *, calls_under_way: bool):
    super().__init__(message)
    self.calls_under_way = calls_under_way


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a model said in one call, and what that cost."""

  text: str
  finish_reason: str
  usage: Usage
  cost_usd: float


@dataclasses.dataclass(frozen=True)
class Totals:
  """The ledger's sums over all that ever used it.

  Attributes:
    paid_calls, prompt_tokens, completion_tokens: of the calls that were answered.
    paid_usd: what those cost.
    uncertain_calls, uncertain_usd: calls under way, those whose answer was lost, and those of
      processes that were killed; at the most that they may cost.
    estimated_calls: of the paid ones, those whose tokens were counted here.
  """

  paid_calls: int
  prompt_tokens: int
  completion_tokens: int
  paid_usd: float
  uncertain_calls: int
  uncertain_usd: float
  estimated_calls: int


class CallStore:
  """Answers by key, and a ledger with a hard cap; used by any number of threads and processes."""

  def __init__(self, path: str | os.PathLike, *, max_usd: float | None):
    """Opens the file, or makes it.

    Args:
      path: on a disk of this machine.
      max_usd: the most that all calls in this file may cost together, those of earlier runs
        included; None for no cap.

    Raises:
      ValueError: `path` is in an object store; `max_usd` is negative.
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
    self._db.execute("PRAGMA journal_mode=WAL")
    self._db.execute("PRAGMA synchronous=FULL")
    self._db.executescript(_LAYOUT)

  def find(self, key: str) -> Answer | None:
    """The answer that was paid for, or None."""
    with self._lock:
      row = self._db.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
    if row is None:
      return None
    values = json.loads(row[0])
    return Answer(**{**values, "usage": Usage(**values["usage"])})

  def begin(self, key: str, *, model: str, most_usd: float) -> int:
    """Writes that a call is about to be made; gives its number.

    Raises:
      BudgetError: it may cost `most_usd`, and less is left.
    """
    nano = math.ceil(most_usd * _NANO)
    with self._transaction() as db:
      [taken] = db.execute("SELECT cost_nano_usd FROM total").fetchone()
      if self._max_nano is not None and taken + nano > self._max_nano:
        raise BudgetError(
          f"a call to {model} may cost {most_usd:.6g} USD; {taken / _NANO:.6g} of the cap of "
          f"{self._max_nano / _NANO:.6g} USD are spent or promised to calls under way "
          f"({self.path}). What is paid for is kept: raise max_usd and run again to go on.",
          calls_under_way=bool(self._open),
        )
      call = self._insert(db, key, model, "open", Usage(0, 0), nano, ended=None)
      self._open.add(call)
      return call

  def paid(self, call: int, answer: Answer) -> Answer:
    """Writes the answer to a call, and what it cost; gives the answer that is kept for its key.

    That is an earlier one if another process has asked the same meanwhile.
    """
    with self._transaction() as db:
      [key, model] = db.execute("SELECT key, model FROM calls WHERE id = ?", (call,)).fetchone()
      self._keep(db, key, model, answer)
      self._end(db, call, "paid", answer.usage, math.ceil(answer.cost_usd * _NANO))
    kept = self.find(key)
    assert kept is not None
    return kept

  def not_billed(self, call: int) -> None:
    """Writes that a call was refused, or never arrived."""
    with self._transaction() as db:
      self._end(db, call, "refused", Usage(0, 0), 0)

  def lost(self, call: int) -> None:
    """Writes that a call was made but its answer lost; it stays at the most that it may cost."""
    with self._transaction() as db:
      db.execute("UPDATE calls SET state = 'lost', ended = ? WHERE id = ?", (time.time(), call))
      self._open.discard(call)

  def add(self, key: str, answer: Answer, *, model: str) -> bool:
    """Writes an answer that was paid for elsewhere; False if the key has one already."""
    with self._transaction() as db:
      if not self._keep(db, key, model, answer):
        return False
      nano = math.ceil(answer.cost_usd * _NANO)
      self._insert(db, key, model, "paid", answer.usage, nano, ended=time.time())
      return True

  def totals(self) -> Totals:
    """The sums until now."""
    with self._lock:
      rows = self._db.execute(
        "SELECT state = 'paid', COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), "
        "SUM(cost_nano_usd), SUM(estimated) FROM calls WHERE state != 'refused' GROUP BY 1"
      ).fetchall()
    by_state = {bool(row[0]): row[1:] for row in rows}
    calls, prompt, completion, nano, estimated = by_state.get(True, (0,) * 5)
    uncertain_calls, _, _, uncertain_nano, _ = by_state.get(False, (0,) * 5)
    return Totals(
      paid_calls=calls,
      prompt_tokens=prompt,
      completion_tokens=completion,
      paid_usd=nano / _NANO,
      uncertain_calls=uncertain_calls,
      uncertain_usd=uncertain_nano / _NANO,
      estimated_calls=estimated,
    )

  def close(self) -> None:
    with self._lock:
      self._db.close()

  @contextlib.contextmanager
  def _transaction(self) -> Iterator[sqlite3.Connection]:
    with self._lock:
      self._db.execute("BEGIN IMMEDIATE")
      try:
        yield self._db
      except BaseException:
        self._db.execute("ROLLBACK")
        raise
      self._db.execute("COMMIT")

  def _keep(self, db, key, model, answer):
    text = json.dumps(dataclasses.asdict(answer))
    added = db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (key, model, text))
    return added.rowcount == 1

  def _insert(self, db, key, model, state, usage, nano, *, ended):
    values = (key, model, time.time(), ended, state, *dataclasses.astuple(usage), nano)
    row = db.execute(f"INSERT INTO calls VALUES (NULL{', ?' * len(values)})", values)
    db.execute("UPDATE total SET cost_nano_usd = cost_nano_usd + ?", (nano,))
    return row.lastrowid

  def _end(self, db, call, state, usage, nano):
    [before] = db.execute("SELECT cost_nano_usd FROM calls WHERE id = ?", (call,)).fetchone()
    db.execute(
      "UPDATE calls SET state = ?, ended = ?, prompt_tokens = ?, completion_tokens = ?, "
      "estimated = ?, cost_nano_usd = ? WHERE id = ?",
      (state, time.time(), *dataclasses.astuple(usage), nano, call),
    )
    db.execute("UPDATE total SET cost_nano_usd = cost_nano_usd + ?", (nano - before,))
    self._open.discard(call)
