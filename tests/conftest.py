"""Eight CPU devices for every test, and the folder of real data where there is one."""

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

# Nearly all of a test's time is XLA optimizing what then runs once: without that it takes half.
# The flag is read when the devices are made; processes that tests start do not inherit it.
_flags = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{_flags or ''} --xla_backend_optimization_level=0"
jax.devices()
if _flags is None:
  del os.environ["XLA_FLAGS"]
else:
  os.environ["XLA_FLAGS"] = _flags


# They begin first, so that no test process is left with one of them when the others are done.
_LONGEST = ("pipelines/test_resume.py", "training/test_multiprocess.py", "test_main.py")


def pytest_collection_modifyitems(items):
  def rank(item):
    path = item.path.as_posix()
    return next((i for i, name in enumerate(_LONGEST) if path.endswith(name)), len(_LONGEST))

  items.sort(key=rank)


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
  """The whole smoke run, by the real command line; nobody may write in its folder.

  The first of the test processes that needs it makes it, the others wait.
  """
  from selfimprove_jax import storage

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


@pytest.fixture(scope="session")
def emulator():
  """Cloud Storage on loopback with a bucket named `bucket`; gives what processes need to find it.

  That is in this process's environment while a test uses `bucket`.
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
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks by gRPC, and waits
    "GCE_METADATA_ROOT": f"127.0.0.1:{port}",  # asked for credentials
    "FSSPEC_GCS_TOKEN": "anon",
  }
  process.communicate("")


@pytest.fixture
def bucket(emulator, tmp_path, monkeypatch):
  """An empty folder of the bucket; local copies go to a folder of the test's own."""
  import fsspec

  from selfimprove_jax import storage

  temporary = tmp_path / "tmp"
  temporary.mkdir()
  for name, value in {**emulator, "TMPDIR": str(temporary)}.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
  monkeypatch.setattr(tempfile, "tempdir", None)
  return storage.path(f"gs://bucket/{uuid.uuid4().hex}")
