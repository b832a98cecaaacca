"""Damages the small files of a finished run: a rerun makes them again, or names the file.

python -m tests.fuzz.run_folder --minutes 10 --seed 0
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator

from selfimprove_jax.runs import artifacts, runner
from selfimprove_jax.runs.stage import Run
from selfimprove_jax.runtime.progress import Progress
from tests.fuzz import harness
from tests.runs import toy

_DOCUMENTED = (artifacts.ArtifactError, artifacts.ConfigMismatchError)
# In one of these stages the run was interrupted: it has a journal and no manifest.
_JOURNALS = ("c", "shards")
STAGES = [
  toy.stage("a"),
  toy.stage("b/one", "a"),
  toy.stage("c", "a", "b/one", value=7),
  toy.stage("shards", changes={"function": toy.write_shards}),
]


@dataclasses.dataclass(frozen=True)
class Case:
  """One damaged file; `data` is its new content, None if it is gone."""

  path: str
  kind: str
  data: bytes | None


def make_run(folder: pathlib.Path) -> None:
  """Makes the run; two of its stages look as if they had been killed before their manifests."""
  _run(folder, verify=False)
  for name in _JOURNALS:
    writer = artifacts.Writer(
      folder / name, **json.loads((folder / name / "config.json").read_bytes())
    )
    for shard, entry in artifacts.open_artifact(folder / name).shards.items():
      counts = {key: entry[key] for key in entry if key not in ("bytes", "sha256")}
      writer.list_shard(shard, counts)
    (folder / name / "manifest.json").unlink()


def _run(folder: pathlib.Path, *, verify: bool) -> None:
  with contextlib.redirect_stdout(io.StringIO()):
    runner.run(
      STAGES, folder, verify=verify, progress=Progress(quiet=True), config={"title": "toy"}
    )


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  """Returns the files that two runs of one config share."""
  files = (path for path in sorted(folder.rglob("*")) if path.is_file())
  skipped = ("timings.jsonl", ".lock")
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in files
    if path.name not in skipped
  }


def make_case(seed: int, files: dict[str, bytes]) -> Case:
  """Damages one of the files; the same one in the same way for the same seed."""
  rng = random.Random(seed)
  name = rng.choice(sorted(files))
  kind = rng.choice([*_DAMAGES, *["any"] * 8])
  data = _DAMAGES[kind](rng, files) if kind in _DAMAGES else harness.damage(rng, files[name])
  return Case(name, kind, data)


def check(case: Case, run: pathlib.Path, whole: dict[str, bytes], folder: pathlib.Path) -> None:
  """Runs again over a copy of `run` with the damaged file.

  Raises:
    AssertionError: other bytes come out, or an error does not name the file.
    Exception: whatever is no documented error.
  """
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(run, folder)
  if case.data is None:
    (folder / case.path).unlink()
  else:
    (folder / case.path).write_bytes(case.data)
  try:
    _run(folder, verify=False)
    Run(folder, None).seconds()
    assert runner.read_config(folder) == {"title": "toy"}
    _run(folder, verify=True)
    assert contents(folder) == whole, "other bytes"
  except _DOCUMENTED as error:
    # What is now another config is named by the folder of its stage.
    stage = pathlib.PurePath(case.path).parent
    names = (case.path, f"{folder / stage} ", f"{stage}: ")
    assert any(name in str(error) for name in names), f"no name in: {error}"


_DAMAGES: dict[str, Callable[[random.Random, dict[str, bytes]], bytes | None]] = {
  "gone": lambda rng, files: None,
  "other": lambda rng, files: files[rng.choice(sorted(files))],
}


@contextlib.contextmanager
def opened() -> Iterator[Callable[[int], str | None]]:
  """Yields the fuzzer of one run folder."""
  with tempfile.TemporaryDirectory() as scratch:
    root = pathlib.Path(scratch)
    _run(root / "whole", verify=False)
    make_run(root / "run")
    whole = contents(root / "whole")
    paths = [path for path in (root / "run").rglob("*") if path.is_file()]
    files = {path.relative_to(root / "run").as_posix(): path.read_bytes() for path in paths}

    def try_seed(seed: int) -> str | None:
      case = make_case(seed, files)
      try:
        check(case, root / "run", whole, root / "copy")
      except Exception as error:
        return f"{case.path} ({case.kind}): {type(error).__name__}: {str(error)[:300]}"
      return None

    yield try_seed


if __name__ == "__main__":
  harness.main(__doc__, opened)
