"""Artifacts: folders that stages write and later stages read once they are complete.

  pairs/
    config.json               {"config": {...}, "inputs": {"embeddings": "<digest>"}}
    00000-of-00016.jsonl      one record per line
    manifest.json             {"shards": {name: {"bytes", "sha256", "records"}}, "summary": {...},
                               "checksum": of these two and of config.json}

`config.json` is written first and `manifest.json` last; each shard in between appears whole. To
resume is to write again with the same config: shards that are whole are skipped. `shards.jsonl`
lists them until there is a manifest; each of its lines has a checksum. What is damaged is made
again: a line of the journal costs its shard, a manifest costs the artifact. Nothing in these
files depends on time, host or order of work, so two runs of one config hold the same bytes. A shard
is a file or a folder (a zarr array). Shards are written and read as local files: in an object store
a finished shard is uploaded, and a reader gets a downloaded copy.
"""

import contextlib
import dataclasses
import errno
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
  write_atomic(path, _encode(value))


def _encode(value: Any) -> bytes:
  return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def read_json(path: storage.Path) -> Any:
  """Returns what `write_json` wrote.

  Raises:
    ArtifactError: the file holds other bytes than `write_json` writes.
  """
  data = path.read_bytes()
  try:
    value = json.loads(data)
    if _encode(value) == data:
      return value
    reason = "it is not as it was written"
  except (ValueError, RecursionError) as error:
    reason = str(error)
  raise ArtifactError(f"{path} is damaged: {reason}")


def _check_same_config(path: storage.Path, config: Any) -> None:
  config = json.loads(json.dumps(config))
  if not path.exists():
    write_json(path, config)
  elif lines := differences(_read_config(path), config):
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

  @property
  def digest(self) -> str:
    """Identifies config, inputs and content; stages record it for each of their inputs."""
    return self.manifest["checksum"]

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
    ArtifactError: it is missing or unfinished, its config or manifest is damaged, or a shard has
      another size than in the manifest.
  """
  folder = storage.path(folder)
  if not has_manifest(folder):
    state = "unfinished" if (folder / _CONFIG).exists() else "missing"
    raise ArtifactError(f"artifact {folder} is {state}: run the stage that writes it")
  artifact = Artifact(folder, _read_manifest(folder))
  sizes = storage.sizes(folder, artifact.shards)
  for name, entry in artifact.shards.items():
    size = sizes[name]
    if size != entry["bytes"]:
      found = "missing" if size is None else f"{size} bytes"
      raise ArtifactError(f"{folder / name} is damaged: {found}, {entry['bytes']} bytes expected")
  return artifact


def _read_manifest(folder: storage.Path) -> dict[str, Any]:
  """Returns the manifest.

  Raises:
    ArtifactError: it or the config is damaged.
  """
  if not (folder / _CONFIG).exists():
    raise ArtifactError(f"{folder} is damaged: it has a {_MANIFEST} and no {_CONFIG}")
  config, manifest = _read_config(folder / _CONFIG), read_json(folder / _MANIFEST)
  if not _fit(config, manifest):
    raise ArtifactError(
      f"{folder / _MANIFEST} is damaged: its checksum is not that of its content and of {_CONFIG}; "
      f"one of the two was changed"
    )
  return manifest


def _fit(config: Any, manifest: Any) -> bool:
  """Tells whether a manifest's checksum is that of this config and of its other content."""
  if not isinstance(manifest, dict) or "checksum" not in manifest:
    return False
  return manifest["checksum"] == _checksum(config, manifest)


def _checksum(config: Any, manifest: dict[str, Any]) -> str:
  return digest([config, {key: manifest[key] for key in manifest if key != "checksum"}])


def _read_config(path: storage.Path) -> dict[str, Any]:
  config = read_json(path)
  if not isinstance(config, dict) or config.keys() != {"config", "inputs"}:
    raise ArtifactError(f"{path} is damaged: it has not the keys `config` and `inputs`")
  return config


def has_manifest(folder: storage.Path) -> bool:
  """Tells whether an artifact was completed, even if it has been damaged since."""
  return (folder / _MANIFEST).exists()


def damage(folder: storage.Path) -> str | None:
  """Tells what is wrong with the config or the manifest of an artifact; None if nothing is."""
  try:
    if has_manifest(folder):
      _read_manifest(folder)
    elif (folder / _CONFIG).exists():
      _read_config(folder / _CONFIG)
  except ArtifactError as error:
    return str(error)
  return None


def read_config(folder: storage.Path) -> Any:
  """Returns the config that an artifact was begun with; None if it was not begun or is damaged."""
  path = folder / _CONFIG
  return _read_config(path)["config"] if path.exists() and not damage(folder) else None


def repair(folder: storage.Path) -> list[str]:
  """Removes the damaged shards of an artifact, which makes it unfinished; returns their names."""
  if not has_manifest(folder) or damage(folder):
    return []
  shards = _read_manifest(folder)["shards"]
  if damaged := _remove_damaged(folder, shards):
    storage.replace_lines(folder / _JOURNAL, _journal_lines(shards))
    (folder / _MANIFEST).unlink()
  return damaged


def is_artifact(folder: storage.Path) -> bool:
  """Tells whether a folder was begun as an artifact, even if it has been damaged since."""
  if has_manifest(folder) or (folder / _JOURNAL).exists():
    return True
  return (folder / _CONFIG).exists() and damage(folder) is None


def clear(folder: storage.Path) -> None:
  """Empties the folder of an artifact, whose lock the caller holds."""
  for path in folder.iterdir():
    if path.name != storage.LOCK:
      storage.remove(path)


def unlist(folder: storage.Path, *, forget_inputs: bool) -> None:
  """Makes an artifact unfinished and its shards mere files; the caller holds its lock.

  Args:
    forget_inputs: lets the next writer make it from other inputs.
  """
  for name in (_MANIFEST, _JOURNAL, *([_CONFIG] if forget_inputs else [])):
    storage.remove(folder / name)


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
    self._config = json.loads(json.dumps({"config": config, "inputs": dict(inputs)}))
    self.repaired: list[str] = []
    if scratch is None:
      self.folder.mkdir(parents=True, exist_ok=True)
      storage.remove_temporaries(self.folder)
      self._forget_if_damaged()
      _check_same_config(self.folder / _CONFIG, self._config)
      self.repaired += [f"{name} is damaged and is made again" for name in repair(self.folder)]
    found = storage.read_lines(self.folder / _JOURNAL, errors="replace")
    self._journal, num_damaged = _parse_journal(found)
    if scratch is None:
      if num_damaged:
        self.repaired.append(
          f"{self.folder / _JOURNAL} has {num_damaged} damaged lines; their shards are made again"
        )
      _remove_damaged(self.folder, self._journal)
      if [*_journal_lines(self._journal).values()] != found:
        storage.replace_lines(self.folder / _JOURNAL, _journal_lines(self._journal))

  def _forget_if_damaged(self) -> None:
    """Begins the artifact again if its manifest is damaged; a damaged config is written again."""
    reason = damage(self.folder)
    path = self.folder / _CONFIG
    if reason is None:
      return
    with contextlib.suppress(ArtifactError):
      if has_manifest(self.folder) and _fit(self._config, read_json(self.folder / _MANIFEST)):
        self.repaired.append(f"{reason}. {_CONFIG} is written again")
        write_json(path, self._config)
        return
    self.repaired.append(f"{reason}. The artifact is made again")
    if not path.exists() or path.read_bytes() != _encode(self._config):
      clear(self.folder)  # nothing tells what it was made from
      return
    # Nothing vouches for the shards, which a `ShardLoop` would take over by their names. What else
    # is there (checkpoints) is checked by those who read it. The manifest goes last: until then a
    # killed process leaves it damaged.
    for shard in self.folder.glob("[0-9]*.jsonl"):
      storage.remove(shard)
    storage.remove(self.folder / _JOURNAL)
    storage.remove(self.folder / _MANIFEST)

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
    manifest = json.loads(json.dumps({"shards": shards, "summary": summary or {}}))
    manifest["checksum"] = _checksum(self._config, manifest)
    write_json(self.folder / _MANIFEST, manifest)
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


def _entry(path: storage.Path, counts: Mapping[str, int]) -> dict[str, Any]:
  return {"bytes": storage.num_bytes(path), "sha256": storage.sha256(path), **counts}


def write_jsonl(path: pathlib.Path, records: Iterable[dict[str, Any]]) -> int:
  """Writes one record per line, with sorted keys; returns their number."""
  num_records = 0
  with path.open("w", encoding="utf-8") as file:
    for record in records:
      file.write(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n")
      num_records += 1
  return num_records


def _remove_damaged(folder: storage.Path, entries: dict[str, dict[str, Any]]) -> list[str]:
  """Removes the shards that are not as their entries say, and the entries; returns their names."""
  damaged = [name for name, entry in entries.items() if not _is_whole(folder / name, entry)]
  for name in damaged:
    # The file goes before its entry: a killed process must not leave a damaged file that no entry
    # contradicts.
    storage.remove(folder / name)
    del entries[name]
  return damaged


def _is_whole(path: storage.Path, entry: dict[str, Any]) -> bool:
  return storage.num_bytes(path) == entry["bytes"] and storage.sha256(path) == entry["sha256"]


def _journal_lines(entries: dict[str, dict[str, Any]]) -> dict[str, str]:
  return {
    name: json.dumps({"name": name, **entry, "checksum": digest([name, entry])}) + "\n"
    for name, entry in entries.items()
  }


def _parse_journal(lines: list[str]) -> tuple[dict[str, dict[str, Any]], int]:
  """Returns the entries of the whole lines, and the number of the others.

  A crash or a full disk tears the last line.
  """
  entries, num_whole = {}, 0
  for line in lines:
    with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError, KeyError):
      entry = json.loads(line)
      name, checksum = entry.pop("name"), entry.pop("checksum")
      if checksum == digest([name, entry]):
        entries[name] = entry
        num_whole += 1
  return entries, len(lines) - num_whole
