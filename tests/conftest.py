"""Eight CPU devices for every test, and the folder of real data where there is one."""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# Nearly all of a test's time is XLA optimizing what then runs once: without that it takes half.
# The flag is read when the devices are made; processes that tests start do not inherit it.
_flags = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{_flags or ''} --xla_backend_optimization_level=0"
jax.devices()
if _flags is None:
  del os.environ["XLA_FLAGS"]
else:
  os.environ["XLA_FLAGS"] = _flags


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory) -> pathlib.Path:
  """Where what one test compiled is found by the next."""
  folder = tmp_path_factory.mktemp("compilation_cache")
  jax.config.update("jax_compilation_cache_dir", str(folder))
  return folder


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
  """The folder that SELFIMPROVE_DATA names (corpora, evals, models)."""
  folder = os.environ.get("SELFIMPROVE_DATA")
  if not folder or not pathlib.Path(folder).is_dir():
    pytest.skip("SELFIMPROVE_DATA names no folder of real corpora")
  return pathlib.Path(folder)


@pytest.fixture(scope="session")
def one_device_mesh() -> jax.sharding.Mesh:
  """A mesh of one device, on which what needs no mesh runs fastest."""
  from selfimprove_jax import partitioning

  return partitioning.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])


REPO = pathlib.Path(__file__).resolve().parents[1]
# What two runs of one config do not share: times, and the checkpoints' own files, whose names are
# random (their parameters' checksums are in the manifests).
_NOT_DATA = {
  "timings.jsonl",
  "speed.jsonl",
  "report",
  "logs",
  "checkpoints",
  "tensorboard",
  ".lock",
}


@pytest.fixture(scope="session")
def command():
  """What starts the command line with some arguments, as a list for `subprocess`."""
  return lambda *arguments: [sys.executable, "-m", "selfimprove_jax.main", *map(str, arguments)]


@pytest.fixture(scope="session")
def subprocess_options() -> dict[str, Any]:
  """For runs of the command line: one CPU device, and XLA told to optimize less, to save time."""
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
  return {"cwd": REPO, "env": {**os.environ, "XLA_FLAGS": flags}, "text": True}


@pytest.fixture(scope="session")
def run_command(command, subprocess_options):
  """Runs the command line to its end; gives the finished process with what it printed."""

  def run(*arguments, env=None) -> subprocess.CompletedProcess:
    options = subprocess_options | {"env": subprocess_options["env"] | (env or {})}
    return subprocess.run(command(*arguments), capture_output=True, timeout=900, **options)

  return run


@dataclasses.dataclass(frozen=True)
class FinishedRun:
  """A run of the command line: its folder, the finished process, and seconds."""

  folder: pathlib.Path
  process: subprocess.CompletedProcess
  seconds: float


@pytest.fixture(scope="session")
def smoke(run_command, tmp_path_factory) -> FinishedRun:
  """The whole smoke run, made once by the real command line; nobody may write in its folder."""
  folder = tmp_path_factory.mktemp("smoke") / "run"
  began = time.monotonic()
  process = run_command("--config=configs/sbp_quick.py:smoke", f"--workdir={folder}")
  assert process.returncode == 0, process.stdout + process.stderr
  return FinishedRun(folder, process, time.monotonic() - began)


@pytest.fixture
def smoke_copy(smoke, tmp_path) -> pathlib.Path:
  """A copy of the finished smoke run, to damage."""
  return pathlib.Path(shutil.copytree(smoke.folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def data_files():
  """Path under a folder -> bytes, of every file in which two runs of one config are equal."""

  def read(folder: pathlib.Path) -> dict[str, bytes]:
    files = (path.relative_to(folder) for path in sorted(folder.rglob("*")))
    return {
      path.as_posix(): (folder / path).read_bytes()
      for path in files
      if (folder / path).is_file() and not _NOT_DATA & set(path.parts)
    }

  return read
