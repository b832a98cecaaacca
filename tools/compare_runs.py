"""Tells whether two run folders hold the same run, to the byte.

  python tools/compare_runs.py runs/a runs/b
  python tools/compare_runs.py --ignore_configs runs/a runs/b

Compares every artifact (config, manifest, shards), the parameters by the checksums in the
manifests, and the loss curves. Prints differing data first, then differing configs: the
`config.json` of a run or an artifact, and a `manifest.json` of which only `summary.model` differs
(and the checksum of config and content).
Exits with 1 if anything differs; with --ignore_configs, only if data do. Skips times, logs,
TensorBoard files and the checkpoints' own files, which differ between any two runs.
"""

import argparse
import filecmp
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

_SKIPPED = {"timings.jsonl", "speed.jsonl", "report", "logs", "checkpoints", "tensorboard", "wandb"}
_SKIPPED |= {".lock"}
_MANIFEST = "manifest.json"
_MODEL = "summary.model"  # the model's config, which a manifest repeats
_SHOWN_VALUES = 4


def compared_files(run_folder: pathlib.Path) -> set[pathlib.Path]:
  """Returns the paths, below the run's folder, of every file that two equal runs share."""
  paths = (path.relative_to(run_folder) for path in run_folder.rglob("*") if path.is_file())
  return {path for path in paths if not _SKIPPED & set(path.parts)}


def differences(a: pathlib.Path, b: pathlib.Path) -> tuple[list[str], list[str]]:
  """Returns one line per missing or differing file: those of data, and those of configs."""
  files_a, files_b = compared_files(a), compared_files(b)
  data = [f"only in {a}: {path}" for path in sorted(files_a - files_b)]
  data += [f"only in {b}: {path}" for path in sorted(files_b - files_a)]
  configs = []
  for path in sorted(files_a & files_b):
    if filecmp.cmp(a / path, b / path, shallow=False):
      continue
    if path.name == _MANIFEST:
      manifests = (json.loads((run / path).read_bytes()) for run in (a, b))
      values = [(key, change) for key, change in _differing(*manifests) if key != "checksum"]
      is_config = all(key.startswith(_MODEL) for key, _ in values)
      shown = [f"{key}: {change}" for key, change in values if is_config or _MODEL not in key]
      more = f"; and {len(shown) - _SHOWN_VALUES} more" if len(shown) > _SHOWN_VALUES else ""
      line = f"differs: {path} ({'; '.join(shown[:_SHOWN_VALUES])}{more})"
    else:
      # An exported model has a config.json too, but no manifest next to it: that is data.
      is_config = path.name == "config.json" and (
        path.parent == pathlib.Path() or (a / path).with_name(_MANIFEST).exists()
      )
      line = f"differs: {path}"
    (configs if is_config else data).append(line)
  return data, configs


def _differing(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, str]]:
  """Yields the dotted path of every value that differs, and how."""
  if isinstance(a, dict) and isinstance(b, dict):
    for key in sorted(a.keys() | b.keys()):
      yield from _differing(a.get(key), b.get(key), f"{path}.{key}" if path else key)
  elif a != b:
    yield path, f"{a!r} -> {b!r}"


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("a", type=pathlib.Path)
  parser.add_argument("b", type=pathlib.Path)
  parser.add_argument(
    "--ignore_configs", action="store_true", help="exit with 0 if only configs differ"
  )
  arguments = parser.parse_args()
  for folder in (arguments.a, arguments.b):
    if not (folder / "config.json").exists():
      parser.error(f"{folder} holds no run: it has no config.json")
  data, configs = differences(arguments.a, arguments.b)
  for lines, kind in ((data, "data"), (configs, "configs")):
    if lines:
      print(f"{kind} that differ: {len(lines)}", *lines, sep="\n  ")
  num_files = len(compared_files(arguments.a))
  if not data:
    print(f"the same {num_files - len(configs)} files" + (" of data" if configs else ""))
  return 1 if data or (configs and not arguments.ignore_configs) else 0


if __name__ == "__main__":
  sys.exit(main())
