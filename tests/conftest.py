"""Fixtures: eight CPU devices, the command line, the smoke run, real data, and a bucket."""

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# Most of a test's time is XLA optimizing programs that run once; without it tests take half the
# time. XLA reads the flag when it makes the devices; processes that tests start do not inherit it.
_flags = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{_flags or ''} --xla_backend_optimization_level=0"
jax.devices()
if _flags is None:
  del os.environ["XLA_FLAGS"]
else:
  os.environ["XLA_FLAGS"] = _flags


# The longest files start first, so that no pytest worker is left with one of them at the end.
_LONGEST = ("pipelines/test_resume.py", "training/test_multiprocess.py", "test_whole_runs.py")


def pytest_collection_modifyitems(items):
  def rank(item):
    path = item.path.as_posix()
    return next((i for i, name in enumerate(_LONGEST) if path.endswith(name)), len(_LONGEST))

  items.sort(key=rank)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory) -> pathlib.Path:
  """A compilation cache that all tests of a pytest worker share."""
  folder = tmp_path_factory.mktemp("compilation_cache")
  jax.config.update("jax_compilation_cache_dir", str(folder))
  return folder


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
  """The folder of real data (corpora, evals, models) that SELFIMPROVE_DATA names."""
  folder = os.environ.get("SELFIMPROVE_DATA")
  if not folder or not pathlib.Path(folder).is_dir():
    pytest.skip("SELFIMPROVE_DATA names no folder of real corpora")
  return pathlib.Path(folder)


@pytest.fixture(scope="session")
def one_device_mesh() -> jax.sharding.Mesh:
  """A mesh of one device, the fastest for tests that need no larger one."""
  from selfimprove_jax.runtime import partitioning

  return partitioning.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])


REPO = pathlib.Path(__file__).resolve().parents[1]
# Files that differ between two runs of one config: times, and the checkpoints' files, whose names
# are random (the manifests have their parameters' checksums).
_NOT_DATA = {
  "timings.jsonl",
  "speed.jsonl",
  "report",
  "logs",
  "checkpoints",
  "tensorboard",
  "wandb",
  ".lock",
}


@pytest.fixture(scope="session")
def command():
  """Makes the argument list for `subprocess` that starts the command line."""
  return lambda *arguments: [sys.executable, "-m", "selfimprove_jax.main", *map(str, arguments)]


@pytest.fixture(scope="session")
def subprocess_options() -> dict[str, Any]:
  """Options for runs of the command line: one CPU device, and XLA without optimizations."""
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
  return {"cwd": REPO, "env": {**os.environ, "XLA_FLAGS": flags}, "text": True}


@pytest.fixture(scope="session")
def run_command(command, subprocess_options):
  """Runs the command line to its end; returns the process with what it printed."""

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
  """The whole smoke run by the real command line; tests must not write in its folder.

  The first pytest worker that needs it makes it; the others wait.
  """
  from selfimprove_jax.runs import storage

  root = tmp_path_factory.getbasetemp()
  root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "smoke"
  folder, finished = root / "run", root / "finished.json"
  with storage.lock(root):
    if not finished.exists():
      began = time.monotonic()
      process = run_command("--config=configs/sbp_quick.py:smoke", f"--workdir={folder}")
      told = {name: getattr(process, name) for name in ("args", "returncode", "stdout", "stderr")}
      finished.write_text(json.dumps([told, time.monotonic() - began]))
  told, seconds = json.loads(finished.read_text())
  process = subprocess.CompletedProcess(**told)
  assert process.returncode == 0, process.stdout + process.stderr
  return FinishedRun(folder, process, seconds)


@pytest.fixture
def smoke_copy(smoke, tmp_path) -> pathlib.Path:
  """A copy of the finished smoke run that a test may damage."""
  return pathlib.Path(shutil.copytree(smoke.folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def data_files():
  """Reads relative path -> bytes of every file that is equal in two runs of one config."""

  def read(folder: pathlib.Path) -> dict[str, bytes]:
    files = (path.relative_to(folder) for path in sorted(folder.rglob("*")))
    return {
      path.as_posix(): (folder / path).read_bytes()
      for path in files
      if (folder / path).is_file() and not _NOT_DATA & set(path.parts)
    }

  return read


@pytest.fixture(scope="session")
def emulator():
  """The variables by which clients find an emulator of Cloud Storage with a bucket `bucket`.

  This process has them while a test uses the fixture `bucket`.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  script = pathlib.Path(__file__).with_name("gcs_emulator.py")
  process = subprocess.Popen(
    [sys.executable, script, str(port)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  assert process.stdout.readline() == "listening\n"
  yield {
    "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
    "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # its gRPC request would block
    "GCE_METADATA_ROOT": f"127.0.0.1:{port}",  # asked for credentials
    "FSSPEC_GCS_TOKEN": "anon",
  }
  process.communicate("")


@pytest.fixture
def bucket(emulator, tmp_path, monkeypatch):
  """An empty folder of the bucket; local copies go to the test's own folder."""
  import fsspec

  from selfimprove_jax.runs import storage

  temporary = tmp_path / "tmp"
  temporary.mkdir()
  for name, value in {**emulator, "TMPDIR": str(temporary)}.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
  monkeypatch.setattr(tempfile, "tempdir", None)
  return storage.path(f"gs://bucket/{uuid.uuid4().hex}")
