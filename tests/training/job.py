"""One process of a training run; not a test. Run by `start_job` with its settings as globals."""

import importlib.util
import json
import os
import threading

import fsspec
import jax

from selfimprove_jax import distributed, partitioning, storage
from selfimprove_jax.data import mixture, rows
from selfimprove_jax.models import llama
from selfimprove_jax.models.checksums import checksums
from selfimprove_jax.progress import Progress
from selfimprove_jax.training import loop, preemption

SETTINGS: dict  # set by whoever runs this

settings = SETTINGS
os.environ.update(settings["environment"])
fsspec.config.set_conf_env(fsspec.config.conf)  # which it read when it was imported
log = os.open(settings["log"], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
os.dup2(log, 1)
os.dup2(log, 2)
jax.config.update("jax_num_cpu_devices", settings["num_devices"])

spec = importlib.util.spec_from_file_location("conftest", settings["conftest"])
conftest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conftest)

if settings["num_processes"] > 1:
  distributed.initialize(
    coordinator=f"localhost:{settings['port']}",
    num_processes=settings["num_processes"],
    process_id=settings["process_id"],
    connect_seconds=60,
    heartbeat_seconds=settings["heartbeat_seconds"],
    hang_seconds=settings["hang_seconds"],
  )
preemption.install()


class Mixture(mixture.Mixture):
  """Gives this process nothing more from a step on, if the settings say so."""

  def batch(self, step):
    if step == settings["stuck_at"]:
      threading.Event().wait()
    return super().batch(step)


folder = storage.path(settings["run_folder"])
num_rows, num_steps = settings["num_rows"], settings["num_steps"]
counts = {"records": num_rows, "tokens": 0, "targets": 0, "padding": 0}
source = rows.RowSource([settings["rows"]], counts=[counts], seq_len=conftest.SEQ_LEN)
mesh = partitioning.make_mesh(**settings["mesh"])
index, count = partitioning.process_rows(mesh)
setup = conftest.Setup(llama.Llama(conftest.CONFIG))
result = loop.train(
  folder=folder,
  model=setup.model,
  tx=setup.tx,
  learning_rate=setup.learning_rate,
  mesh=mesh,
  mixture=Mixture(
    [mixture.Component("unique", source, 1.0, True)],
    batch_size=8,
    num_steps=num_steps,
    seed=0,
    process_index=index,
    process_count=count,
  ),
  schedule=loop.Schedule(
    num_steps=num_steps,
    board_every=5,
    evaluate_every=10,
    checkpoint_every=settings["checkpoint_every"],
    keep=2,
  ),
  seed=0,
  evaluate=lambda params: float(jax.jit(lambda p: p["embedding_VD"].sum())(params)),
  label="test",
  progress=Progress(quiet=True),
)
sums = checksums(result.params)
if distributed.is_main():
  (folder / "result.json").write_text(json.dumps({"step": result.step, "checksums": sums}))
