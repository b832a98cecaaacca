"""Stage outputs: a folder that is either complete and whole, or is not read.

  pairs/
    config.json               {"config": {...}, "inputs": {"embeddings": "<digest>"}}
    00000-of-00016.jsonl      one record a line
    manifest.json             {"shards": {name: {"bytes", "sha256", "records"}}, "summary": {...}}

`config.json` is written first and `manifest.json` last; shards appear whole in between.
To resume is to write again with the same config: shards that are whole are skipped. Nothing in
these files depends on time, host or order of work, so two runs of one config hold the same bytes.
A shard is a file or a folder (a zarr array). It is written and read as local files: in an object
store those are copies, and what was written is uploaded when it is whole.
"""

import collections
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from selfimprove_jax import storage
from selfimprove_jax.storage import write_atomic

_CONFIG = "config.json"
_MANIFEST = "manifest.json"
_JOURNAL = "shards.jsonl"


class ArtifactError(RuntimeError):
  """An artefact is missing, unfinished or damaged."""


class ConfigMismatchError(ValueError):
  """A folder holds the output of another config."""


def shard_name(index: int, count: int, suffix: str = ".jsonl") -> str:
  """`00003-of-00016.jsonl`."""
  return f"{index:05d}-of-{count:05d}{suffix}"


def digest(value: Any) -> str:
  """SHA-256 of a JSON-able value, independent of the order of its keys."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
  """One line for each leaf in which two JSON-able values differ: `path: old -> new`."""
  if isinstance(old, dict) and isinstance(new, dict):
    lines = []
    for key in sorted(old.keys() | new.keys()):
      where = f"{path}.{key}" if path else str(key)
      if key not in old:
        lines.append(f"{where}: (absent) -> {new[key]!r}")
      elif key not in new:
        lines.append(f"{where}: {old[key]!r} -> (absent)")
      else:
        lines += differences(old[key], new[key], where)
    return lines
  return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def write_json(path: str | os.PathLike, value: Any) -> None:
  write_atomic(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def check_same_config(path: storage.Path, config: Any) -> None:
  """Writes `config` to `path`, or compares it with what is there.

  Raises:
    ConfigMismatchError: the file holds another config; the message lists every difference.
  """
  config = json.loads(json.dumps(config))
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, config)
    return
  lines = differences(json.loads(path.read_bytes()), config)
  if lines:
    raise ConfigMismatchError(
      f"{path.parent} was made with another config; use another folder or delete this one.\n"
      f"Differences (there -> now):\n  " + "\n  ".join(lines)
    )


@dataclasses.dataclass(frozen=True)
class Artifact:
  """A complete artefact: its manifest was read and every shard has the size the manifest says."""

  folder: storage.Path
  manifest: dict[str, Any]

  @property
  def summary(self) -> dict[str, Any]:
    return self.manifest["summary"]

  @property
  def shards(self) -> dict[str, dict[str, Any]]:
    return self.manifest["shards"]

  @functools.cached_property
  def digest(self) -> str:
    """Identifies config, inputs and content; what the next stage records as its input."""
    return digest([json.loads((self.folder / _CONFIG).read_bytes()), self.manifest])

  def path(self, name: str) -> pathlib.Path:
    """A local path of a shard, after its bytes have been compared with the manifest."""
    if name not in self.shards:
      raise ArtifactError(f"{self.folder} has no shard {name!r}; it has {sorted(self.shards)}")
    path = storage.local_copy(self.folder / name, checksum=self.shards[name]["sha256"])
    if path is None:
      raise ArtifactError(
        f"{self.folder / name} is damaged: its SHA-256 is not the one in {_MANIFEST}. Run the same "
        f"command with --verify, which makes damaged shards again"
      )
    return path

  def records(self) -> Iterator[dict[str, Any]]:
    """Every record of every `.jsonl` shard, in the order of shard names.

    Shards whose name starts with an underscore (records kept beside) are passed over.
    """
    for name in sorted(self.shards):
      if name.endswith(".jsonl") and not name.startswith("_"):
        yield from self.read_jsonl(name)

  def read_jsonl(self, name: str) -> Iterator[dict[str, Any]]:
    return _read_jsonl(self.path(name))


def open_artifact(folder: str | os.PathLike) -> Artifact:
  """Opens a complete artefact.

  Raises:
    ArtifactError: it is missing, unfinished, or a shard is not as long as the manifest says.
  """
  folder = storage.path(folder)
  if not (folder / _MANIFEST).exists():
    state = "unfinished" if (folder / _CONFIG).exists() else "missing"
    raise ArtifactError(f"artefact {folder} is {state}: run the stage that writes it")
  artifact = Artifact(folder, json.loads((folder / _MANIFEST).read_bytes()))
  sizes = storage.sizes(folder, artifact.shards)
  for name, entry in artifact.shards.items():
    size = sizes[name]
    if size != entry["bytes"]:
      found = "missing" if size is None else f"{size} bytes"
      raise ArtifactError(f"{folder / name} is damaged: {found}, {entry['bytes']} bytes expected")
  return artifact


def tidy(folder: str | os.PathLike) -> None:
  """Removes from a complete artefact what a process left that was killed in its last act."""
  storage.remove(storage.path(folder) / _JOURNAL)


class Writer:
  """Writes one artefact; see the module's docstring for what ends up there."""

  def __init__(self, folder: str | os.PathLike, *, config: Any, inputs: dict[str, str]):
    """Opens `folder` for writing.

    Args:
      config: JSON-able; all that determines the content beside the inputs.
      inputs: name -> `Artifact.digest` of what the content is made from.

    Raises:
      ConfigMismatchError: the folder was begun with another config or other inputs.
    """
    self.folder = storage.path(folder)
    self.folder.mkdir(parents=True, exist_ok=True)
    check_same_config(self.folder / _CONFIG, {"config": config, "inputs": inputs})
    found = storage.read_lines(self.folder / _JOURNAL)
    self._journal = _parse_journal(found)
    lines = _journal_lines(self._journal)
    if [*lines.values()] != found:
      storage.replace_lines(self.folder / _JOURNAL, lines)

  def repair(self) -> list[str]:
    """Makes a damaged artefact unfinished again; names its damaged shards, keeps the others."""
    manifest_path = self.folder / _MANIFEST
    if not manifest_path.exists():
      return []
    shards = json.loads(manifest_path.read_bytes())["shards"]
    damaged = [name for name, entry in shards.items() if not self._is_whole(name, entry)]
    if damaged:
      self._journal = {name: entry for name, entry in shards.items() if name not in damaged}
      storage.replace_lines(self.folder / _JOURNAL, _journal_lines(self._journal))
      manifest_path.unlink()
      for name in damaged:
        storage.remove(self.folder / name)
    return damaged

  def has(self, name: str) -> bool:
    """Whether the shard was written before, and is still the bytes that were written."""
    return name in self._journal and self._is_whole(name, self._journal[name])

  def counts(self, name: str) -> dict[str, int]:
    """What was counted when the shard was written."""
    return {k: v for k, v in self._journal[name].items() if k not in ("bytes", "sha256")}

  def read_jsonl(self, name: str) -> Iterator[dict[str, Any]]:
    """The records of a shard that is whole."""
    return _read_jsonl(self.folder / name)

  def write_jsonl(self, name: str, records: Iterable[dict[str, Any]]) -> None:
    """Writes one shard of JSON lines, or nothing if it is already whole."""
    if self.has(name):
      return
    with self.shard(name) as (path, counts):
      counts["records"] = _write_jsonl(path, records)

  def write_json(self, name: str, value: Any) -> None:
    if not self.has(name):
      with self.shard(name) as (path, counts):
        write_json(path, value)
        counts["records"] = 1

  def contribute_jsonl(self, name: str, records: Iterable[dict[str, Any]]) -> None:
    """Writes a shard of which this process alone has the records, or nothing if it is there.

    It is no part of the artefact until the process that writes that takes it in.
    """
    if not self.has_contributed(name):
      with self._told_of_full_disk(name), storage.replacing(self.folder / name) as path:
        _write_jsonl(path, records)

  def has_contributed(self, name: str) -> bool:
    """Whether a contributed shard is there: what appears is whole."""
    return self.has(name) if name in self._journal else (self.folder / name).exists()

  def take_in(
    self, name: str, *, count: Callable[[dict[str, Any]], Mapping[str, int]]
  ) -> dict[str, int]:
    """Makes a contributed shard one of the artefact's; gives its counts.

    Args:
      count: what a record adds to the counts, beside 1 to `records`.
    """
    if name not in self._journal:
      path, counts = self.folder / name, collections.Counter()
      for record in _read_jsonl(path):
        counts.update(records=1, **count(record))
      self._enter(name, _entry(path, counts))
    return self.counts(name)

  def discard_contributed(self) -> None:
    """Removes contributed shards that were not taken in."""
    for path in self.folder.glob("*.jsonl"):
      if path.name not in (*self._journal, _JOURNAL):
        path.unlink()

  @contextlib.contextmanager
  def shard(self, name: str) -> Iterator[tuple[pathlib.Path, dict[str, int]]]:
    """Gives a local path to write to, and counts to fill in; the shard appears on leaving.

    Raises:
      OSError: with the shard's name, where it could not be written (a full disk); the shard does
        not appear, and the same run goes on from there once there is room.
    """
    counts = {"records": 0}
    with self._told_of_full_disk(name):
      with storage.replacing(self.folder / name) as temporary:
        yield temporary, counts
        entry = _entry(temporary, counts)
      self._enter(name, entry)

  def _enter(self, name, entry):
    storage.append_line(self.folder / _JOURNAL, _journal_lines({name: entry})[name], key=name)
    self._journal[name] = entry

  @contextlib.contextmanager
  def _told_of_full_disk(self, name):
    try:
      yield
    except Exception as error:
      if not isinstance(error, OSError) and not _tells_of_full_disk(error):
        raise
      raise OSError(
        f"could not write shard {name} of {self.folder}: {error}. Shards before it are kept: if "
        f"the disk is full make room, and run the same command again"
      ) from error

  def finish(self, summary: dict[str, Any] | None = None) -> Artifact:
    """Writes the manifest, with which the artefact is complete."""
    shards = {name: self._journal[name] for name in sorted(self._journal)}
    write_json(self.folder / _MANIFEST, {"shards": shards, "summary": summary or {}})
    tidy(self.folder)
    return open_artifact(self.folder)

  def _is_whole(self, name: str, entry: dict[str, Any]) -> bool:
    path = self.folder / name
    return storage.num_bytes(path) == entry["bytes"] and storage.sha256(path) == entry["sha256"]


class Follower(Writer):
  """For the processes of a job beside the one that writes: writes nothing but contributed shards.

  All of them make the same shards, since all take part in making them; here they go to scratch.
  """

  def __init__(self, folder: str | os.PathLike, *, scratch: str | os.PathLike):
    """Opens what a `Writer` in another process has opened, and not begun to write to."""
    self.folder = storage.path(folder)
    self._scratch = pathlib.Path(scratch)
    found = _parse_journal(storage.read_lines(self.folder / _JOURNAL))
    self._journal = {name: entry for name, entry in found.items() if self._is_whole(name, entry)}

  def repair(self) -> list[str]:
    return []

  def has(self, name: str) -> bool:
    return name in self._journal

  def read_jsonl(self, name: str) -> Iterator[dict[str, Any]]:
    made_here = self._scratch / name
    return _read_jsonl(made_here if made_here.exists() else self.folder / name)

  @contextlib.contextmanager
  def shard(self, name: str) -> Iterator[tuple[pathlib.Path, dict[str, int]]]:
    counts = {"records": 0}
    path = self._scratch / name
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path, counts
    self._journal[name] = dict(counts)  # an export writes in the main process alone: no file here

  def finish(self, summary: dict[str, Any] | None = None) -> None:
    """Nothing: the manifest is written by another."""


def _tells_of_full_disk(error: Exception) -> bool:
  # Libraries that write by themselves (ArrayRecord, tensorstore) raise other kinds than OSError.
  codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
  return any(os.strerror(code) in str(error) for code in codes)


def _read_jsonl(path: storage.Path) -> Iterator[dict[str, Any]]:
  with path.open("rb") as file:
    for line in file:
      yield json.loads(line)


def _entry(path: pathlib.Path, counts: Mapping[str, int]) -> dict[str, Any]:
  return {"bytes": storage.num_bytes(path), "sha256": storage.sha256(path), **counts}


def _write_jsonl(path: pathlib.Path, records: Iterable[dict[str, Any]]) -> int:
  num_records = 0
  with path.open("w", encoding="utf-8") as file:
    for record in records:
      file.write(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n")
      num_records += 1
  return num_records


def _journal_lines(entries: dict[str, dict[str, Any]]) -> dict[str, str]:
  return {name: json.dumps({"name": name, **entry}) + "\n" for name, entry in entries.items()}


def _parse_journal(lines: list[str]) -> dict[str, dict[str, Any]]:
  entries = {}
  for line in lines:
    try:
      entry = json.loads(line)
    except json.JSONDecodeError:
      break  # torn by a crash or a full disk: that shard, and what follows, is written again
    entries[entry.pop("name")] = entry
  return entries
