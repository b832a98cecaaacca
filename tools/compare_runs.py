"""Whether two folders of one config hold the same run, to the byte.

  python tools/compare_runs.py runs/a runs/b

Compares every data artefact (configs, manifests, shards), the parameters by the checksums in the
manifests, and the loss curves. Prints what differs; exits with 1 if anything does. Times, logs,
TensorBoard files and the checkpoints' own files, which differ between any two runs, are left out.
"""

import argparse
import filecmp
import pathlib
import sys

_OUTSIDE = {"timings.jsonl", "speed.jsonl", "report", "logs", "checkpoints", "tensorboard", ".lock"}


def compared_files(run_folder: pathlib.Path) -> set[pathlib.Path]:
  """Paths, under the run's folder, of every file that two equal runs share."""
  paths = (path.relative_to(run_folder) for path in run_folder.rglob("*") if path.is_file())
  return {path for path in paths if not _OUTSIDE & set(path.parts)}


def differences(a: pathlib.Path, b: pathlib.Path) -> list[str]:
  """One line for each file that only one run has, or whose bytes differ."""
  files_a, files_b = compared_files(a), compared_files(b)
  lines = [f"only in {a}: {path}" for path in sorted(files_a - files_b)]
  lines += [f"only in {b}: {path}" for path in sorted(files_b - files_a)]
  shared = sorted(files_a & files_b)
  return lines + [
    f"differs: {path}" for path in shared if not filecmp.cmp(a / path, b / path, shallow=False)
  ]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("a", type=pathlib.Path)
  parser.add_argument("b", type=pathlib.Path)
  arguments = parser.parse_args()
  for folder in (arguments.a, arguments.b):
    if not (folder / "config.json").exists():
      parser.error(f"{folder} holds no run: it has no config.json")
  lines = differences(arguments.a, arguments.b)
  print("\n".join(lines) or f"the same {len(compared_files(arguments.a))} files")
  return 1 if lines else 0


if __name__ == "__main__":
  sys.exit(main())
