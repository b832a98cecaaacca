import dataclasses
import functools
import json
import multiprocessing
import pathlib
import runpy
import time

import jax
import jax.numpy as jnp
import numpy as np
import portpicker
import pytest

from selfimprove_jax.data import packing, rows
from selfimprove_jax.models import llama
from selfimprove_jax.training import losses, train_step
from selfimprove_jax.training.config import TrainingConfig

SEQ_LEN = 16
CONFIG = llama.LlamaConfig(
  vocab_size=32,
  num_layers=2,
  embed_dim=16,
  mlp_dim=32,
  num_heads=8,
  num_kv_heads=4,
  head_dim=4,
  dropout_rate=0.1,
  dtype="float32",
)
# With a small eps AdamW turns the rounding noise of gradients near 0 into full steps.
TRAINING = TrainingConfig(
  batch_rows=8, peak_lr=1e-2, final_lr=1e-3, warmup_fraction=0.1, eps=1e-3, board_every=5
)
WEIGHT_DECAY = 0.1
LEARNING_RATE = TRAINING.learning_rate(20)


@dataclasses.dataclass(frozen=True)
class Setup:
  """A model with its optimizer; keeps its compiled train steps."""

  model: llama.Llama
  learning_rate = staticmethod(LEARNING_RATE)
  tx = TRAINING.make_optimizer(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

  @functools.cached_property
  def loss(self):
    return losses.next_token_loss(self.model)

  def state(self, mesh, seed=0):
    """Returns a fresh state, which may be donated."""
    return jax.tree.map(jnp.copy, self._state(mesh, seed))

  @functools.cache  # noqa: B019
  def _state(self, mesh, seed):
    return train_step.init_state(self.model, self.tx, mesh, key=jax.random.key(seed))

  def abstract(self, mesh):
    return train_step.abstract_state(self.model, self.tx, mesh)

  @functools.cache  # noqa: B019
  def step_fn(self, mesh, accumulation_steps=1):
    return self.step_fn_of(self.loss, mesh, accumulation_steps)

  def step_fn_of(self, loss, mesh, accumulation_steps):
    jitted = train_step.make_train_step(
      loss, self.model, self.tx, self.learning_rate, mesh, accumulation_steps=accumulation_steps
    )

    def step(*arguments):
      with jax.set_mesh(mesh):
        return jitted(*arguments)

    return step


@pytest.fixture(scope="session")
def make_setup():
  return lambda **changes: Setup(llama.Llama(dataclasses.replace(CONFIG, **changes)))


@pytest.fixture(scope="session")
def packed_rows() -> list[packing.Row]:
  """Rows of documents of 3 to 12 random tokens."""
  r = np.random.default_rng(0)
  lengths = r.integers(3, 12, 120)
  examples = (
    packing.Example(r.integers(0, CONFIG.vocab_size, n).astype(np.int32), np.ones(n, bool))
    for n in lengths
  )
  return list(packing.pack(examples, seq_len=SEQ_LEN, pad_id=0))


@pytest.fixture(scope="session")
def batches(packed_rows):
  """Batches of 8 rows on the host."""
  return [
    {name: np.stack([row[name] for row in packed_rows[i : i + 8]]) for name in packed_rows[0]}
    for i in range(0, len(packed_rows) - 7, 8)
  ]


@pytest.fixture(scope="session")
def source(packed_rows, tmp_path_factory) -> rows.RowSource:
  path = tmp_path_factory.mktemp("rows") / "00000-of-00001.array_record"
  counts = rows.write_rows(path, packed_rows)
  return rows.RowSource([path], counts=[counts], seq_len=SEQ_LEN)


@dataclasses.dataclass
class Job:
  """Operating-system processes that train in one folder."""

  folder: pathlib.Path
  processes: list[multiprocessing.Process]

  def end(self, timeout=120) -> list[int]:
    """Waits until all have ended by themselves; returns their exit codes."""
    for process in self.processes:
      process.join(timeout)
      assert process.exitcode is not None, f"{process} is still running: {self.log()}"
    return [process.exitcode for process in self.processes]

  def kill(self) -> None:
    for process in self.processes:
      process.kill()
      process.join()

  def num_steps(self) -> int:
    """Counts the lines of metrics so far, which are a few more than the steps."""
    path = self.folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0

  def wait_until(self, condition) -> None:
    while not condition():
      assert all(p.is_alive() for p in self.processes), f"ended too soon: {self.log()}"
      time.sleep(0.001)

  def log(self) -> str:
    return "".join(path.read_text() for path in sorted(self.folder.glob("log-*")))

  def result(self) -> dict:
    return json.loads((self.folder / "result.json").read_text())


@pytest.fixture
def start_job(source, compilation_cache, monkeypatch):
  """Starts processes, each with its own CPU devices, that train together in a folder."""
  monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compilation_cache))
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
  here = pathlib.Path(__file__).parent
  # The server that forks the processes has imported the package but initialized no device.
  processes = multiprocessing.get_context("forkserver")
  processes.set_forkserver_preload(["selfimprove_jax.training.loop", "tensorboardX"])
  jobs = []

  def start(folder, *, num_processes=1, num_devices=1, mesh=None, stuck=(None, None), **changes):
    folder.mkdir(parents=True, exist_ok=True)
    port = portpicker.pick_unused_port()
    started = []
    for process_id in range(num_processes):
      settings = {
        "run_folder": str(folder),
        "conftest": str(here / "conftest.py"),
        "log": str(folder / f"log-{process_id}"),
        "rows": source._paths[0],
        "num_rows": len(source),
        "num_steps": 40,
        "checkpoint_every": 3,
        "num_processes": num_processes,
        "process_id": process_id,
        "num_devices": num_devices,
        "mesh": mesh or {"data": 1, "fsdp": -1, "tensor": 1},
        "port": port,
        "heartbeat_seconds": 100,
        "hang_seconds": 100,
        "environment": {},
        "stuck_at": stuck[1] if stuck[0] == process_id else None,
      }
      arguments = (str(here / "job.py"), {"SETTINGS": settings | changes})
      started.append(processes.Process(target=runpy.run_path, args=arguments))
      started[-1].start()
    jobs.append(Job(folder, started))
    return jobs[-1]

  yield start
  for job in jobs:
    job.kill()
