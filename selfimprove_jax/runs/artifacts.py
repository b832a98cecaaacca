"""Artifacts: folders that stages write and later stages read once they are complete.

  pairs/
    config.json               {"config": {...}, "inputs": {"embeddings": "<digest>"}}
    00000-of-00016.jsonl      one record per line
    manifest.json             {"shards": {name: {"bytes", "sha256", "records"}}, "summary": {...}}

`config.json` is written first and `manifest.json` last; each shard in between appears whole. To
resume is to write again with the same config: shards that are whole are skipped. Nothing in these
files depends on time, host or order of work, so two runs of one config hold the same bytes. A shard
is a file or a folder (a zarr array). Shards are written and read as local files: in an object store
a finished shard is uploaded, and a reader gets a downloaded copy.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from selfimprove_jax.runs import storage
from selfimprove_jax.runs.storage import write_atomic

_CONFIG = "config.json"
_MANIFEST = "manifest.json"
_JOURNAL = "shards.jsonl"


class ArtifactError(RuntimeError):
  """An artifact is missing, unfinished or damaged."""


class ConfigMismatchError(ValueError):
  """A folder holds the output of another config."""


def shard_name(index: int, count: int, suffix: str = ".jsonl") -> str:
  """Returns a shard's file name, such as `00003-of-00016.jsonl`."""
  return f"{index:05d}-of-{count:05d}{suffix}"


def digest(value: Any) -> str:
  """Returns the SHA-256 of a JSON-able value, independent of the order of its keys."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
  """Returns a line `path: old -> new` for each leaf in which two JSON-able values differ."""
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


def _check_same_config(path: storage.Path, config: Any) -> None:
  config = json.loads(json.dumps(config))
  if not path.exists():
    write_json(path, config)
  elif lines := differences(json.loads(path.read_bytes()), config):
    raise ConfigMismatchError(
      f"{path.parent} was made with another config or from other inputs; use another folder or "
      f"delete this one.\nDifferences (there -> now):\n  " + "\n  ".join(lines)
    )


@dataclasses.dataclass(frozen=True)
class Artifact:
  """A complete artifact; its shards have the sizes that the manifest says."""

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
    """Identifies config, inputs and content; stages record it for each of their inputs."""
    return digest([json.loads((self.folder / _CONFIG).read_bytes()), self.manifest])

  def path(self, name: str) -> pathlib.Path:
    """Returns a local path of a shard, after comparing its bytes with the manifest."""
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
    """Yields the records of all `.jsonl` shards in the order of their names.

    Shards whose name starts with an underscore are skipped; these hold rejected records.
    """
    for name in sorted(self.shards):
      if name.endswith(".jsonl") and not name.startswith("_"):
        yield from self.read_jsonl(name)

  def read_jsonl(self, name: str) -> Iterator[dict[str, Any]]:
    return _read_jsonl(self.path(name))


def open_artifact(folder: str | os.PathLike) -> Artifact:
  """Opens a complete artifact.

  Raises:
    ArtifactError: it is missing or unfinished, or a shard has another size than in the manifest.
  """
  folder = storage.path(folder)
  if not (folder / _MANIFEST).exists():
    state = "unfinished" if (folder / _CONFIG).exists() else "missing"
    raise ArtifactError(f"artifact {folder} is {state}: run the stage that writes it")
  artifact = Artifact(folder, json.loads((folder / _MANIFEST).read_bytes()))
  sizes = storage.sizes(folder, artifact.shards)
  for name, entry in artifact.shards.items():
    size = sizes[name]
    if size != entry["bytes"]:
      found = "missing" if size is None else f"{size} bytes"
      raise ArtifactError(f"{folder / name} is damaged: {found}, {entry['bytes']} bytes expected")
  return artifact


def has_manifest(folder: storage.Path) -> bool:
  """Tells whether an artifact was completed, even if it has been damaged since."""
  return (folder / _MANIFEST).exists()


def read_config(folder: storage.Path) -> Any:
  """Returns the config that an artifact was begun with, or None if it was not begun."""
  path = folder / _CONFIG
  return json.loads(path.read_bytes())["config"] if path.exists() else None


def repair(folder: storage.Path) -> list[str]:
  """Removes the shards whose bytes are not the manifest's, which makes the artifact unfinished."""
  if not has_manifest(folder):
    return []
  return Writer(folder, **json.loads((folder / _CONFIG).read_bytes())).repair()


def clear(folder: storage.Path) -> None:
  """Empties the folder of an artifact, whose lock the caller holds."""
  for path in folder.iterdir():
    if path.name != storage.LOCK:
      storage.remove(path)


def tidy(folder: str | os.PathLike) -> None:
  """Removes the journal that a process killed right after writing the manifest left."""
  storage.remove(storage.path(folder) / _JOURNAL)


class Writer:
  """Writes one artifact; the module's docstring describes the files.

  In a pod job all processes run the stages that use devices, and all of them make the same shards.
  The writers of the processes that do not write get a `scratch` folder: their shards go there, and
  nobody reads them but this process.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    config: Any,
    inputs: Mapping[str, str],
    scratch: pathlib.Path | None = None,
  ):
    """Opens `folder` for writing.

    Args:
      config: JSON-able; with the inputs, everything that determines the content.
      inputs: role -> `Artifact.digest` of what the content is made from.
      scratch: see the class. The writing process must have opened the folder before.

    Raises:
      ConfigMismatchError: the folder was begun with another config or other inputs.
    """
    self.folder = storage.path(folder)
    self._scratch = scratch
    if scratch is None:
      self.folder.mkdir(parents=True, exist_ok=True)
      _check_same_config(self.folder / _CONFIG, {"config": config, "inputs": inputs})
    found = storage.read_lines(self.folder / _JOURNAL)
    self._journal = _parse_journal(found)
    if scratch is None:
      self._remove_damaged(self._journal)
      if [*_journal_lines(self._journal).values()] != found:
        self._rewrite_journal()

  def repair(self) -> list[str]:
    """Removes the damaged shards of an artifact, which makes it unfinished; returns their names."""
    manifest_path = self.folder / _MANIFEST
    if self._scratch is not None or not manifest_path.exists():
      return []
    shards = json.loads(manifest_path.read_bytes())["shards"]
    if damaged := self._remove_damaged(shards):
      self._journal = shards
      self._rewrite_journal()
      manifest_path.unlink()
    return damaged

  def _remove_damaged(self, entries: dict[str, dict[str, Any]]) -> list[str]:
    damaged = [name for name, entry in entries.items() if not self._is_whole(name, entry)]
    for name in damaged:
      # The file goes before its entry: a killed process must not leave a damaged file that no entry
      # contradicts.
      storage.remove(self.folder / name)
      del entries[name]
    return damaged

  def _rewrite_journal(self) -> None:
    storage.replace_lines(self.folder / _JOURNAL, _journal_lines(self._journal))

  def _is_whole(self, name: str, entry: dict[str, Any]) -> bool:
    path = self.folder / name
    return storage.num_bytes(path) == entry["bytes"] and storage.sha256(path) == entry["sha256"]

  def has(self, name: str) -> bool:
    """Tells whether the shard is written, here or in an earlier run."""
    return name in self._journal

  def counts(self, name: str) -> dict[str, int]:
    """Returns the counts that were stored with the shard."""
    return {k: v for k, v in self._journal[name].items() if k not in ("bytes", "sha256")}

  def read_jsonl(self, name: str) -> Iterator[dict[str, Any]]:
    """Yields the records of a shard that is written."""
    if self._scratch is not None and (self._scratch / name).exists():
      return _read_jsonl(self._scratch / name)
    return _read_jsonl(self.folder / name)

  def write_jsonl(self, name: str, records: Iterable[dict[str, Any]]) -> None:
    """Writes one shard of JSON lines, or does nothing if it is already written."""
    if not self.has(name):
      with self.shard(name) as (path, counts):
        counts["records"] = write_jsonl(path, records)

  def write_json(self, name: str, value: Any) -> None:
    if not self.has(name):
      with self.shard(name) as (path, counts):
        write_json(path, value)
        counts["records"] = 1

  @contextlib.contextmanager
  def shard(self, name: str) -> Iterator[tuple[pathlib.Path, dict[str, int]]]:
    """Yields a local path to write to and counts to fill in; the shard appears on leaving.

    Raises:
      OSError: the shard could not be written (a full disk); it does not appear, and the same
        command continues from there once there is room.
    """
    counts = {"records": 0}
    if self._scratch is not None:
      path = self._scratch / name
      path.parent.mkdir(parents=True, exist_ok=True)
      yield path, counts
      self._journal[name] = counts  # an export has no file here: only the main process writes it
      return
    with self._naming_full_disk(name):
      with storage.replacing(self.folder / name) as path:
        yield path, counts
        entry = _entry(path, counts)
      self._append(name, entry)

  def write_unlisted(self, name: str, records: Iterable[dict[str, Any]]) -> None:
    """Writes a file of JSON lines that is no shard until `list_shard`; any process of a job may."""
    with self._naming_full_disk(name), storage.replacing(self.folder / name) as path:
      write_jsonl(path, records)

  def list_shard(self, name: str, counts: Mapping[str, int]) -> None:
    """Makes a whole file of the folder a shard."""
    self._append(name, _entry(self.folder / name, counts))

  def _append(self, name: str, entry: dict[str, Any]) -> None:
    storage.append_line(self.folder / _JOURNAL, _journal_lines({name: entry})[name], key=name)
    self._journal[name] = entry

  @contextlib.contextmanager
  def _naming_full_disk(self, name: str) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      if not isinstance(error, OSError) and not _reports_full_disk(error):
        raise
      raise OSError(
        f"could not write shard {name} of {self.folder}: {error}. The shards before it are kept: "
        f"if the disk is full make room, and run the same command again"
      ) from error

  def finish(self, summary: dict[str, Any] | None = None) -> Artifact | None:
    """Writes the manifest, which completes the artifact; a writer with `scratch` does nothing."""
    if self._scratch is not None:
      return None
    shards = {name: self._journal[name] for name in sorted(self._journal)}
    write_json(self.folder / _MANIFEST, {"shards": shards, "summary": summary or {}})
    tidy(self.folder)
    return open_artifact(self.folder)


def _reports_full_disk(error: Exception) -> bool:
  # Libraries that open files themselves (ArrayRecord, tensorstore) raise other types than OSError.
  codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
  return any(os.strerror(code) in str(error) for code in codes)


def _read_jsonl(path: storage.Path) -> Iterator[dict[str, Any]]:
  with path.open("rb") as file:
    for line in file:
      yield json.loads(line)


def _entry(path: pathlib.Path, counts: Mapping[str, int]) -> dict[str, Any]:
  return {"bytes": storage.num_bytes(path), "sha256": storage.sha256(path), **counts}


def write_jsonl(path: pathlib.Path, records: Iterable[dict[str, Any]]) -> int:
  """Writes one record per line, with sorted keys; returns their number."""
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
      break  # torn by a crash or a full disk: this shard and those after it are written again
    entries[entry.pop("name")] = entry
  return entries
