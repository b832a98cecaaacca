"""Stores a run in a folder on a disk, or in `gs://bucket/folder` in Google Cloud Storage.

A disk renames, appends and locks. An object store does none of these, but an object appears whole
or not at all: journals become one object per line, libraries that need files get local copies, and
a lock is a lease. Scratch files and copies are in the temporary folder of the machine (`TMPDIR`),
which needs room for everything that the host reads of the run.
"""

import atexit
import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
import socket
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import filelock
from etils import epath

# Otherwise etils imports TensorFlow, if it is installed, for its client of the store.
os.environ.setdefault("EPATH_USE_TF", "false")

Path = pathlib.Path | epath.Path

LOCK = ".lock"  # the file by which `lock` locks a folder
_LEASE_SECONDS = 60.0
_SETTLE_SECONDS = 3.0

_logger = logging.getLogger(__name__)


def path(where: str | os.PathLike) -> Path:
  """Returns a `pathlib.Path`, or for `gs://bucket/folder` an `etils.epath.Path` of the same API.

  Raises:
    ValueError: the address has another scheme than `gs://`.
  """
  text = os.fspath(where)
  if "://" not in text:
    return pathlib.Path(text)
  if not text.startswith("gs://"):
    raise ValueError(f"{text} is neither a folder on a disk nor gs://bucket/folder")
  import fsspec

  # Other hosts write too, so a cached listing may be out of date.
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
  return epath.Path(text)


def is_remote(where: str | os.PathLike) -> bool:
  """Tells whether a path is in an object store."""
  return os.fspath(where).startswith("gs://")


def write_atomic(where: str | os.PathLike, data: bytes) -> None:
  """Writes a file that is either whole or absent, even after a crash."""
  if is_remote(where):
    _store().pipe_file(os.fspath(where), data)
    return
  with replacing(pathlib.Path(where)) as temporary:
    temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(where: Path) -> Iterator[pathlib.Path]:
  """Yields a local path for a file or a folder, which replaces `where` on leaving.

  In an object store a folder appears file by file: readers must learn elsewhere that it is whole.
  """
  if is_remote(where):
    with _temporary() as folder:
      yield folder / where.name
      if where.is_dir():
        remove(where)
      upload(folder / where.name, where)
    return
  temporary = _temporary_name(where)
  try:
    yield temporary
    for file in _files(temporary):
      with file.open("rb") as opened:
        os.fsync(opened.fileno())
    _replace(temporary, where)
  finally:
    remove(temporary)


def _replace(source: pathlib.Path, where: pathlib.Path) -> None:
  while True:
    try:
      source.replace(where)
      return
    except OSError as error:
      if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR):
        raise
    # A folder is there, which only an empty one may replace. It goes in one step, for another
    # process may be replacing it at the same time.
    old = _temporary_name(where)
    with contextlib.suppress(FileNotFoundError):
      where.rename(old)
    remove(old)


def _temporary_name(where: pathlib.Path) -> pathlib.Path:
  return where.with_name(f".{where.name}.{uuid.uuid4().hex[:12]}.tmp")


def is_temporary(where: Path) -> bool:
  """Tells whether `replacing` gave out this path."""
  return where.name.startswith(".") and where.name.endswith(".tmp")


def remove_temporaries(folder: Path) -> None:
  """Removes what killed processes left of `replacing`; the caller alone writes in the folder."""
  if not is_remote(folder):
    for left in filter(is_temporary, list(folder.iterdir())):
      remove(left)


def upload(source: pathlib.Path, target: Path) -> None:
  """Copies a local file, or all files of a local folder, to an object store."""
  files = _files(source)
  names = [os.fspath(target / file.relative_to(source)) for file in files]
  _store().put([str(file) for file in files], names)


def remove(where: Path) -> None:
  """Removes a file or a folder with its content; does nothing if there is none."""
  if is_remote(where):
    with contextlib.suppress(FileNotFoundError):
      _store().rm(os.fspath(where), recursive=True)
  elif where.is_dir() and not where.is_symlink():
    shutil.rmtree(where)
  else:
    where.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
  """Renames a folder; in an object store by copies within the store."""
  remove(target)
  if is_remote(source):
    names = _objects(source)
    new = [f"{os.fspath(target)}/{name.removeprefix(_key(source) + '/')}" for name in names]
    _store().copy(list(names), new)
    remove(source)
  else:
    source.rename(target)


def sizes(folder: Path, names: Iterable[str]) -> dict[str, int | None]:
  """Returns the bytes of each file or folder in `folder`; None if there is none of that name."""
  if not is_remote(folder):
    return {name: num_bytes(folder / name) for name in names}
  # One listing for all of them: a request per shard would take minutes for thousands of shards.
  found = {os.path.basename(i["name"]): i for i in _store().ls(os.fspath(folder), detail=True)}
  return {
    name: found[name]["size"]
    if name in found and found[name]["type"] == "file"
    else num_bytes(folder / name)
    for name in names
  }


def num_bytes(where: Path) -> int | None:
  """Returns the size of a file, or of all files in a folder; None if there is nothing."""
  if is_remote(where):
    objects = _objects(where)
    return sum(objects.values()) if objects else None
  return sum(file.stat().st_size for file in _files(where)) if where.exists() else None


def sha256(where: Path) -> str:
  """Returns the checksum of a file's bytes, or for a folder of its files' names and checksums."""
  if where.is_dir():
    if is_remote(where):
      files = {n.removeprefix(_key(where) + "/"): epath.Path(f"gs://{n}") for n in _objects(where)}
    else:
      files = {str(file.relative_to(where)): file for file in _files(where)}
    sums = {name: sha256(file) for name, file in files.items()}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
  with where.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def local_copy(where: Path, *, checksum: str) -> pathlib.Path | None:
  """Returns a local path of bytes with this `sha256`; None if `where` holds other bytes.

  On a disk it is `where` itself; for an object it is a copy, which is cached.
  """
  if not is_remote(where):
    return where if sha256(where) == checksum else None
  copy = _scratch_root() / "copies" / checksum / where.name
  if copy.exists() and sha256(copy) == checksum:
    return copy
  with _temporary() as folder:
    fresh = folder / where.name
    _download(where, fresh)
    if sha256(fresh) != checksum:
      return None
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
      fresh.replace(copy)
    except OSError:  # a folder is there: a damaged copy, or the copy of another process
      if sha256(copy) != checksum:
        remove(copy)
        fresh.replace(copy)
  return copy


def scratch(where: Path) -> pathlib.Path:
  """Returns a local folder for work on `where`: on a disk `where` itself. It may not exist yet."""
  if is_remote(where):
    return _scratch_root() / "work" / hashlib.sha256(os.fspath(where).encode()).hexdigest()[:16]
  return where


def append_line(where: Path, line: str, *, key: str) -> None:
  """Appends a line to a journal: to a file, or as the object `where/key`.

  An object of the same key is replaced, so a line that must stay needs a key of its own.
  """
  if is_remote(where):
    write_atomic(where / key, line.encode())
  else:
    with where.open("a") as file:
      file.write(line)


def read_lines(where: Path, *, errors: str = "strict") -> list[str]:
  """Returns the lines of a journal with their newlines; the last of a file may be torn.

  Args:
    errors: of `bytes.decode`: what to do with a damaged line that is no UTF-8.

  Raises:
    ValueError: a line is no UTF-8, and errors is strict.
  """
  if is_remote(where):
    names = sorted(_objects(where))
    found = _store().cat(names) if names else {}
    lines = [found[name] for name in names]
  else:
    lines = where.read_bytes().splitlines(keepends=True) if where.exists() else []
  try:
    return [line.decode(errors=errors) for line in lines]
  except UnicodeDecodeError as error:
    raise ValueError(f"{where} is damaged: {error}") from None


def replace_lines(where: Path, lines: Mapping[str, str]) -> None:
  """Replaces all lines of a journal; keys as in `append_line`."""
  if is_remote(where):
    remove(where)
    for key, line in lines.items():
      append_line(where, line, key=key)
  else:
    write_atomic(where, "".join(lines.values()).encode())


class LineLog:
  """Appends lines to a file; on a disk a line is written at once, in a store by `sync`."""

  def __init__(self, where: Path, *, text: str | None = None):
    """Opens the file to append to its content, or to `text`, which replaces the content."""
    if text is not None:
      write_atomic(where, text.encode())
    self._where = where
    self._file = None if is_remote(where) else where.open("a", encoding="utf-8")
    self._lines = [where.read_bytes().decode()] if self._file is None and where.exists() else []

  def write(self, line: str) -> None:
    if self._file is None:
      self._lines.append(line)
    else:
      self._file.write(line)
      self._file.flush()

  def sync(self) -> None:
    if self._file is None:
      write_atomic(self._where, "".join(self._lines).encode())

  def close(self) -> None:
    self.sync()
    if self._file is not None:
      self._file.close()


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
  """Locks a folder; a second process says so and waits until the first has left or has died.

  In an object store the lock is a lease: a process that finds it unrenewed for a minute takes it
  over. A process that was suspended for that long finds out by a line in its log.
  """
  if is_remote(folder):
    with _lease(folder / LOCK):
      yield
    return
  folder.mkdir(parents=True, exist_ok=True)
  held = filelock.FileLock(folder / LOCK)
  try:
    held.acquire(blocking=False)
  except filelock.Timeout:
    owner = (folder / LOCK).read_text(errors="replace") or "another process"
    _logger.warning("%s is being written by %s: waiting", folder, owner)
    held.acquire()
  try:
    (folder / LOCK).write_text(f"{socket.gethostname()} process {os.getpid()}")
    yield
  finally:
    held.release()


@contextlib.contextmanager
def _lease(where: Path) -> Iterator[None]:
  owner = f"{socket.gethostname()} process {os.getpid()} {uuid.uuid4().hex}"
  _acquire(where, owner)
  left = threading.Event()

  def renew() -> None:
    beat = 0
    while not left.wait(_LEASE_SECONDS / 4):
      try:
        if not _owns(where, owner):
          _logger.error("the lease of %s is lost: another process writes there too", where.parent)
          return
        beat += 1
        write_atomic(where, f"{owner} {beat}".encode())
      except Exception as error:  # of many types; the store may be back the next time
        _logger.warning("the lease of %s could not be renewed: %s", where.parent, error)

  thread = threading.Thread(target=renew, daemon=True)
  thread.start()
  try:
    yield
  finally:
    left.set()
    thread.join()
    if _owns(where, owner):
      remove(where)


def _acquire(where: Path, owner: str) -> None:
  seen, since = None, 0.0
  while True:
    there = _content(where)
    if there is None:
      with contextlib.suppress(FileExistsError):
        _store().pipe_file(os.fspath(where), owner.encode(), mode="create")
        return
    elif there != seen:
      if seen is None:
        _logger.warning("%s is being written by %s: waiting", where.parent, there.decode())
      seen, since = there, time.monotonic()
    elif time.monotonic() - since > _LEASE_SECONDS:
      write_atomic(where, owner.encode())
      time.sleep(_SETTLE_SECONDS)  # if several take it over at once, the last to write owns it
      if _owns(where, owner):
        return
    time.sleep(_LEASE_SECONDS / 30)


def _owns(where: Path, owner: str) -> bool:
  return (_content(where) or b"").startswith(owner.encode())


def _content(where: Path) -> bytes | None:
  try:
    return _store().cat_file(os.fspath(where))
  except FileNotFoundError:
    return None


def _store() -> Any:
  import fsspec

  return fsspec.filesystem("gcs")


def _key(where: Path) -> str:
  """Returns fsspec's name of a path, which lacks the `gs://`."""
  return os.fspath(where).removeprefix("gs://")


def _objects(where: Path) -> dict[str, int]:
  """Returns name (`bucket/folder/file`) -> bytes of an object, or of all objects in a folder."""
  found = _store().find(os.fspath(where), detail=True)
  return {name: info["size"] for name, info in found.items()}


def _files(where: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in where.rglob("*") if p.is_file()) if where.is_dir() else [where]


def _download(source: Path, target: pathlib.Path) -> None:
  if not source.is_dir():
    _store().get_file(os.fspath(source), str(target))
    return
  names = list(_objects(source))
  files = [target / name.removeprefix(_key(source) + "/") for name in names]
  for file in files:
    file.parent.mkdir(parents=True, exist_ok=True)
  _store().get(names, [str(file) for file in files])


def _scratch_root() -> pathlib.Path:
  root = pathlib.Path(tempfile.gettempdir()) / f"selfimprove_jax-{os.getuid()}"
  with contextlib.suppress(FileExistsError):
    root.mkdir(mode=0o700)
  found = root.lstat()
  is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
  return root if is_ours and not found.st_mode & 0o077 else _own_scratch_root(root)


@functools.cache
def _own_scratch_root(root: pathlib.Path) -> pathlib.Path:
  """Returns a folder for this process alone, in place of one in which others may write."""
  _logger.warning("%s is not a folder of this user alone: what is copied there is not kept", root)
  made = tempfile.mkdtemp(prefix=f"{root.name}-")
  atexit.register(shutil.rmtree, made, ignore_errors=True)
  return pathlib.Path(made)


@contextlib.contextmanager
def _temporary() -> Iterator[pathlib.Path]:
  with tempfile.TemporaryDirectory(dir=_scratch_root()) as folder:
    yield pathlib.Path(folder)
