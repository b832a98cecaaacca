"""Where a run is kept: a folder on a disk, or `gs://bucket/folder` in Google Cloud Storage.

All that differs between the two is here. A disk renames, appends and locks. An object store does
neither, but an object appears whole or not at all: journals become one object a line, libraries
that need files get local copies, and a lock is a lease. Scratch files and copies lie in the
temporary folder of the machine (`TMPDIR`), which needs room for what the host reads of the run.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

# Otherwise etils imports TensorFlow, where it is installed, for its client of the store.
os.environ.setdefault("EPATH_USE_TF", "false")

Path = pathlib.Path | epath.Path

_LEASE_SECONDS = 60.0
_SETTLE_SECONDS = 3.0

_logger = logging.getLogger(__name__)


def path(where: str | os.PathLike) -> Path:
  """A `pathlib.Path`, or for `gs://bucket/folder` an `etils.epath.Path`, which reads like one.

  Raises:
    ValueError: another kind of address than `gs://`.
  """
  text = os.fspath(where)
  if "://" not in text:
    return pathlib.Path(text)
  if not text.startswith("gs://"):
    raise ValueError(f"{text} is neither a folder on a disk nor gs://bucket/folder")
  import fsspec

  # Other hosts write too: what a listing showed before says nothing of now.
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
  return epath.Path(text)


def is_remote(where: str | os.PathLike) -> bool:
  """Whether it is in an object store."""
  return os.fspath(where).startswith("gs://")


def write_atomic(where: str | os.PathLike, data: bytes) -> None:
  """Writes a file that is either whole or absent, also after a crash."""
  if is_remote(where):
    _store().pipe_file(os.fspath(where), data)
    return
  with replacing(pathlib.Path(where)) as temporary:
    temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(where: Path) -> Iterator[pathlib.Path]:
  """Gives a local path for a file or a folder, which takes the place of `where` on leaving.

  In an object store a folder appears file by file: whoever reads it must know that it is whole.
  """
  if is_remote(where):
    with _temporary() as folder:
      yield folder / where.name
      if where.is_dir():
        remove(where)
      upload(folder / where.name, where)
    return
  temporary = where.with_name(f".{where.name}.tmp")
  remove(temporary)
  try:
    yield temporary
    for file in _files(temporary):
      with file.open("rb") as opened:
        os.fsync(opened.fileno())
    if where.is_dir():
      remove(where)
    temporary.replace(where)
  finally:
    remove(temporary)


def upload(source: pathlib.Path, target: Path) -> None:
  """Puts a local file, or all files of a local folder, at a place in an object store."""
  files = _files(source)
  names = [os.fspath(target / file.relative_to(source)) for file in files]
  _store().put([str(file) for file in files], names)


def remove(where: Path) -> None:
  """Removes a file, or a folder with all in it; nothing if there is none."""
  if is_remote(where):
    with contextlib.suppress(FileNotFoundError):
      _store().rm(os.fspath(where), recursive=True)
  elif where.is_dir():
    shutil.rmtree(where)
  else:
    where.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
  """Gives a folder another name; in an object store by copies, which do not leave the store."""
  remove(target)
  if is_remote(source):
    names = _objects(source)
    new = [f"{os.fspath(target)}/{name.removeprefix(_key(source) + '/')}" for name in names]
    _store().copy(list(names), new)
    remove(source)
  else:
    source.rename(target)


def sizes(folder: Path, names: Iterable[str]) -> dict[str, int | None]:
  """Bytes of each file or folder in `folder`; None where there is none of that name."""
  if not is_remote(folder):
    return {name: num_bytes(folder / name) for name in names}
  # One listing for all of them: a request a shard would take minutes where there are thousands.
  found = {os.path.basename(i["name"]): i for i in _store().ls(os.fspath(folder), detail=True)}
  return {
    name: found[name]["size"]
    if name in found and found[name]["type"] == "file"
    else num_bytes(folder / name)
    for name in names
  }


def num_bytes(where: Path) -> int | None:
  """Of a file, or of all files in a folder; None where there is nothing."""
  if is_remote(where):
    objects = _objects(where)
    return sum(objects.values()) if objects else None
  return sum(file.stat().st_size for file in _files(where)) if where.exists() else None


def sha256(where: Path) -> str:
  """Of a file's bytes; of a folder, of the names and checksums of its files."""
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
  """A local path of the bytes that have the checksum of `sha256`; None if `where` holds others.

  On a disk that is `where` itself; of an object it is a copy, which is kept and used again.
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
    except OSError:  # a folder is there: a damaged copy, or that of a process that was quicker
      if sha256(copy) != checksum:
        remove(copy)
        fresh.replace(copy)
  return copy


def scratch(where: Path) -> pathlib.Path:
  """A local folder for work on what is in `where`: that itself on a disk; it need not exist."""
  if is_remote(where):
    return _scratch_root() / "work" / hashlib.sha256(os.fspath(where).encode()).hexdigest()[:16]
  return where


def append_line(where: Path, line: str, *, key: str) -> None:
  """Adds a line to a journal: to a file's end, or as the object `where/key`.

  An object of that key is replaced, so a line that must stay needs a key of its own.
  """
  if is_remote(where):
    write_atomic(where / key, line.encode())
  else:
    with where.open("a") as file:
      file.write(line)


def read_lines(where: Path) -> list[str]:
  """The lines of a journal, with their ends; the last of a file may be torn."""
  if is_remote(where):
    names = sorted(_objects(where))
    found = _store().cat(names) if names else {}
    return [found[name].decode() for name in names]
  return where.read_text().splitlines(keepends=True) if where.exists() else []


def replace_lines(where: Path, lines: Mapping[str, str]) -> None:
  """Makes a journal hold these lines, by key, and no others."""
  if is_remote(where):
    remove(where)
    for key, line in lines.items():
      append_line(where, line, key=key)
  else:
    write_atomic(where, "".join(lines.values()).encode())


class LineLog:
  """A file of lines that grows: on a disk a line is there at once, in a store after `sync`."""

  def __init__(self, where: Path, *, text: str | None = None):
    """Goes on after what is there, or, where it is given, after `text` in its place."""
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
  """Two processes never write one folder: the second waits until the first has left.

  In an object store this is a lease: whoever finds that it was not renewed for a minute takes it
  over. A process that stood still for that long, and goes on, is told so in its log only.
  """
  if is_remote(folder):
    with _lease(folder / ".lock"):
      yield
    return
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / ".lock").open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


@contextlib.contextmanager
def _lease(where: Path) -> Iterator[None]:
  owner = f"{socket.gethostname()} process {os.getpid()} {uuid.uuid4().hex}"
  _acquire(where, owner)
  left = threading.Event()

  def renew():
    beat = 0
    while not left.wait(_LEASE_SECONDS / 4):
      try:
        if not _owns(where, owner):
          _logger.error("the lease of %s is lost: another process writes there too", where.parent)
          return
        beat += 1
        write_atomic(where, f"{owner} {beat}".encode())
      except Exception as error:  # of many kinds; the store may be back the next time
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
      time.sleep(_SETTLE_SECONDS)  # of several that take it over at once, the last to write has it
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
  """As fsspec names it: without `gs://`."""
  return os.fspath(where).removeprefix("gs://")


def _objects(where: Path) -> dict[str, int]:
  """Name (`bucket/folder/file`) -> bytes, of an object or of all below a folder."""
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
  root.mkdir(mode=0o700, exist_ok=True)
  return root


@contextlib.contextmanager
def _temporary() -> Iterator[pathlib.Path]:
  with tempfile.TemporaryDirectory(dir=_scratch_root()) as folder:
    yield pathlib.Path(folder)
