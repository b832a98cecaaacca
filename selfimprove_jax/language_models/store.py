"""The cache of paid answers and the ledger of their prices, in one SQLite file.

An answer and its price are written in one transaction, so neither exists without the other. A call
is entered before it is made, at its highest possible price. If the process dies or the answer is
lost, the entry stays at that price, since the call may have been billed. Until it ends, a call
holds the lease of its request, so that no other process makes the same call.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import socket
import sqlite3
import threading
import time
import uuid
import weakref
import zlib
from collections.abc import Iterator, Mapping

from selfimprove_jax.language_models.protocol import TokenLogprob, Usage
from selfimprove_jax.runs import storage

_logger = logging.getLogger(__name__)

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
CREATE TABLE IF NOT EXISTS leases (
  key TEXT PRIMARY KEY, call INTEGER NOT NULL, owner TEXT NOT NULL, expires REAL NOT NULL
) WITHOUT ROWID;
"""
# A lease outlives some beats, since a busy machine may delay them; one of a process on this machine
# that is dead is free at once.
_LEASE_SECONDS, _BEAT_SECONDS = 60.0, 10.0
_CHECKSUM = (
  "checksum(id, key, model, began, ended, state, prompt_tokens, completion_tokens, estimated, "
  "cost_nano_usd)"
)


class BudgetError(RuntimeError):
  """The rest of the hard cap may not cover the next call.

  Attributes:
    calls_in_flight: whether any process has calls in flight, which may turn out cheaper.
  """

  def __init__(self, message: str, *, calls_in_flight: bool) -> None:
    super().__init__(message)
    self.calls_in_flight = calls_in_flight


class StoreError(RuntimeError):
  """The file is damaged or cannot be written, such as on a full disk; the message names it."""


class InFlightError(RuntimeError):
  """Another call, of this or of another process, is about to answer the same request."""


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
    self._owner = f"{_pid_space()} {os.getpid()} {uuid.uuid4()}"
    self._closed = threading.Event()
    self._beats: threading.Thread | None = None
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with self._named():
      self._connect()

  def _connect(self) -> None:
    self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
    # Also for a file that is refused below, and a store that nobody closes.
    weakref.finalize(self, self._db.close)
    # A write-ahead log lets other processes read during a write. FULL syncs each commit to disk:
    # with less, a power failure could lose an answer that was paid for.
    self._db.execute("PRAGMA journal_mode=WAL")
    self._db.execute("PRAGMA synchronous=FULL")
    self._db.create_function("checksum", -1, _row_checksum, deterministic=True)
    self._db.executescript(_LAYOUT)
    with self._transaction() as db:
      if db.execute("PRAGMA user_version").fetchone() == (0,):  # new, or without checksums
        db.execute("ALTER TABLE calls ADD COLUMN checksum INTEGER")
        db.execute(f"UPDATE calls SET checksum = {_CHECKSUM}")
        for key, text in db.execute("SELECT key, answer FROM answers").fetchall():
          if "\n" not in text:
            db.execute("UPDATE answers SET answer = ? WHERE key = ?", (_sealed(key, text), key))
        db.execute("PRAGMA user_version = 1")
    self._check_ledger()

  def _check_ledger(self) -> None:
    with self._transaction("BEGIN") as db:
      wrong = db.execute(f"SELECT id FROM calls WHERE checksum IS NOT {_CHECKSUM}").fetchone()
      [summed] = db.execute("SELECT COALESCE(SUM(cost_nano_usd), 0) FROM calls").fetchone()
      total = db.execute("SELECT cost_nano_usd FROM total").fetchone()
    if wrong is not None or total is None or summed != total[0]:
      what = f"the entry of call {wrong[0]}" if wrong else "the sum of the prices"
      raise StoreError(
        f"{self.path}: {what} is damaged, so what was spent is not known; restore a copy of the "
        f"file, or move it away: a new one begins without the answers that were paid for"
      )

  def find(self, key: str) -> Answer | None:
    """Returns the answer that was paid for, or None."""
    with self._lock, self._named():
      row = self._db.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
    if row is None:
      return None
    try:
      text, checksum = row[0].rsplit("\n", 1)
      if checksum != _checksum(key, text):
        raise ValueError("wrong checksum")
      values = json.loads(text)
    except (ValueError, AttributeError):
      _logger.warning("%s: the answer %s is damaged, and is asked for again", self.path, key)
      with self._transaction() as db:
        db.execute("DELETE FROM answers WHERE key = ? AND answer = ?", (key, row[0]))
      return None
    values["usage"] = Usage(**values["usage"])
    if values.get("logprobs") is not None:
      values["logprobs"] = tuple(map(TokenLogprob.from_json, values["logprobs"]))
    return Answer(**values)

  def begin(self, key: str, *, model: str, most_usd: float, lease: bool = True) -> int:
    """Enters a call that is about to be made; returns its number.

    Args:
      lease: whether the call keeps others for the same key away until it ends, or its process dies.

    Raises:
      InFlightError: another call has the lease.
      BudgetError: less than `most_usd` is left of the cap.
    """
    nano = math.ceil(most_usd * _NANO)
    with self._transaction() as db:
      if lease and _is_leased(db, key):
        raise InFlightError(f"a call for {key} is in flight ({self.path})")
      [taken] = db.execute("SELECT cost_nano_usd FROM total").fetchone()
      if self._max_nano is not None and taken + nano > self._max_nano:
        raise BudgetError(
          f"a call to {model} may cost {most_usd:.6g} USD; {taken / _NANO:.6g} of the cap of "
          f"{self._max_nano / _NANO:.6g} USD are spent or reserved for calls in flight "
          f"({self.path}). Paid answers are kept: raise max_usd and run again to continue.",
          calls_in_flight=_is_leased(db, None),
        )
      call = _insert(db, key, model, "open", Usage(0, 0), nano)
      if lease:
        expires = time.time() + _LEASE_SECONDS
        held = (key, call, self._owner, expires)
        db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)", held)
        if self._beats is None:
          self._beats = threading.Thread(target=self._beat, daemon=True, name="leases")
          self._beats.start()
      return call

  def is_in_flight(self, key: str) -> bool:
    """Returns whether a call for this key holds the lease."""
    with self._lock, self._named():
      return _is_leased(self._db, key)

  def paid(self, call: int, answer: Answer) -> Answer:
    """Stores the answer to a call with its price; returns the answer that is kept for its key.

    It is an earlier one if another process made the same request, after this one lost its lease.
    """
    with self._transaction() as db:
      [key, model] = db.execute("SELECT key, model FROM calls WHERE id = ?", (call,)).fetchone()
      _keep(db, key, model, answer)
      _end(db, call, "paid", answer.usage, math.ceil(answer.cost_usd * _NANO))
    return self.find(key) or answer  # another process may have dropped it

  def not_billed(self, call: int) -> None:
    """Ends a call that was refused or never arrived, at no price."""
    with self._transaction() as db:
      _end(db, call, "refused", Usage(0, 0), 0)

  def lost(self, call: int) -> None:
    """Ends a call whose answer was lost; it stays at its highest possible price."""
    with self._transaction() as db:
      db.execute("UPDATE calls SET state = 'lost', ended = ? WHERE id = ?", (time.time(), call))
      _release(db, call)

  def add(self, key: str, answer: Answer, *, model: str) -> bool:
    """Stores an answer that was paid for elsewhere; returns False if the key has one already."""
    with self._transaction() as db:
      if not _keep(db, key, model, answer):
        return False
      _insert(db, key, model, "paid", answer.usage, math.ceil(answer.cost_usd * _NANO))
      return True

  def drop(self, answers: Mapping[str, Answer]) -> None:
    """Removes answers that turned out unusable, unless others have replaced them.

    The ledger keeps their prices.
    """
    rows = [(key, _text(key, answer)) for key, answer in answers.items()]
    with self._transaction() as db:
      db.executemany("DELETE FROM answers WHERE key = ? AND answer = ?", rows)

  def totals(self) -> Totals:
    """Returns the sums over all calls so far."""
    with self._lock, self._named():
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
    self._closed.set()
    if self._beats is not None:
      self._beats.join()
    with self._lock:
      self._db.close()

  @contextlib.contextmanager
  def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
    with self._lock, self._named():
      # IMMEDIATE takes the write lock before the first read, so that no other process can spend
      # the same dollars between reading the total and adding to it.
      self._db.execute(begin)
      try:
        yield self._db
        self._db.execute("COMMIT")
      except BaseException:
        if self._db.in_transaction:  # SQLite has ended it after some errors
          self._db.execute("ROLLBACK")
        raise

  @contextlib.contextmanager
  def _named(self) -> Iterator[None]:
    try:
      yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
      raise StoreError(f"{self.path}: {error}; answers that were stored before are kept") from error

  def _beat(self) -> None:
    """Renews this store's leases while it is open."""
    while not self._closed.wait(_BEAT_SECONDS):
      with contextlib.suppress(StoreError), self._transaction() as db:
        expires = time.time() + _LEASE_SECONDS
        db.execute("UPDATE leases SET expires = ? WHERE owner = ?", (expires, self._owner))


def _end(db: sqlite3.Connection, call: int, state: str, usage: Usage, nano: int) -> None:
  [before] = db.execute("SELECT cost_nano_usd FROM calls WHERE id = ?", (call,)).fetchone()
  db.execute(
    "UPDATE calls SET state = ?, ended = ?, prompt_tokens = ?, completion_tokens = ?, "
    "estimated = ?, cost_nano_usd = ? WHERE id = ?",
    (state, time.time(), *dataclasses.astuple(usage), nano, call),
  )
  db.execute("UPDATE total SET cost_nano_usd = cost_nano_usd + ?", (nano - before,))
  _release(db, call)


def _release(db: sqlite3.Connection, call: int) -> None:
  """Seals the entry of a call that has ended, and frees its lease."""
  db.execute(f"UPDATE calls SET checksum = {_CHECKSUM} WHERE id = ?", (call,))
  db.execute("DELETE FROM leases WHERE call = ?", (call,))


def _is_leased(db: sqlite3.Connection, key: str | None) -> bool:
  """Returns whether a live process has the lease of a key, or of any key if it is None."""
  rows = db.execute(
    "SELECT owner FROM leases WHERE expires > ? AND (key = ? OR ? IS NULL)", (time.time(), key, key)
  )
  return any(_is_alive(owner) for [owner] in rows)


def _is_alive(owner: str) -> bool:
  """Returns False for a process that is known to have ended."""
  space, pid, _ = owner.rsplit(" ", 2)
  if space != _pid_space():
    return True
  try:
    os.kill(int(pid), 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # it is another user's
    pass
  return True


@functools.cache
def _pid_space() -> str:
  """Returns what tells apart the machines and containers whose process numbers differ."""
  try:
    return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return socket.gethostname()


def _row_checksum(*values: object) -> int:
  return zlib.crc32(repr(values).encode())


def _checksum(key: str, text: str) -> str:
  return hashlib.sha256(f"{key}\n{text}".encode()).hexdigest()


def _sealed(key: str, text: str) -> str:
  return f"{text}\n{_checksum(key, text)}"


def _text(key: str, answer: Answer) -> str:
  return _sealed(key, json.dumps(dataclasses.asdict(answer)))


def _keep(db: sqlite3.Connection, key: str, model: str, answer: Answer) -> bool:
  """Stores an answer unless its key has one; returns whether it was stored."""
  row = (key, model, _text(key, answer))
  return db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", row).rowcount == 1


def _insert(
  db: sqlite3.Connection, key: str, model: str, state: str, usage: Usage, nano: int
) -> int:
  """Enters a call, which has ended unless it is open; returns its number."""
  now = time.time()
  ended = None if state == "open" else now
  values = (key, model, now, ended, state, *dataclasses.astuple(usage), nano)
  row = db.execute(f"INSERT INTO calls VALUES (NULL{', ?' * len(values)}, NULL)", values)
  db.execute(f"UPDATE calls SET checksum = {_CHECKSUM} WHERE id = ?", (row.lastrowid,))
  db.execute("UPDATE total SET cost_nano_usd = cost_nano_usd + ?", (nano,))
  return row.lastrowid
