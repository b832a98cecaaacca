"""One process of a training run, not a test; `start_job` runs it with its settings as a global."""

import dataclasses
import importlib.util
import json
import os
import threading

import fsspec
import jax

from selfimprove_jax.data import mixture, rows
from selfimprove_jax.models import llama
from selfimprove_jax.models.checksums import checksums
from selfimprove_jax.runs import storage
from selfimprove_jax.runtime import distributed, partitioning, preemption
from selfimprove_jax.runtime.progress import Progress
from selfimprove_jax.training import loop

SETTINGS: dict  # set by `start_job`

settings = SETTINGS
os.environ.update(settings["environment"])
fsspec.config.set_conf_env(fsspec.config.conf)  # it read the environment when imported
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
  """Blocks this process forever at the step that the settings name."""

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
training = dataclasses.replace(
  conftest.TRAINING,
  # A constant rate: runs of different lengths begin alike.
  warmup_fraction=0.0,
  final_lr=conftest.TRAINING.peak_lr,
  num_evaluations=-(-num_steps // 10),
  num_checkpoints=-(-num_steps // settings["checkpoint_every"]),
)
result = loop.train(
  folder=folder,
  model=setup.model,
  loss=setup.loss,
  mesh=mesh,
  training=training,
  num_steps=num_steps,
  weight_decay=conftest.WEIGHT_DECAY,
  mixture=Mixture(
    [mixture.Component("unique", source, 1.0, True)],
    batch_size=8,
    num_steps=num_steps,
    seed=0,
    process_index=index,
    process_count=count,
  ),
  seed=0,
  evaluate=lambda params: float(jax.jit(lambda p: p["embedding_VD"].sum())(params)),
  label="test",
  progress=Progress(quiet=True),
)
sums = checksums(result.params)
if distributed.is_main():
  (folder / "result.json").write_text(json.dumps({"step": result.step, "checksums": sums}))
