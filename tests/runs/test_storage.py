"""A run in an object store holds the bytes of a run on a disk; with a Cloud Storage emulator."""

import gc
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from selfimprove_jax.data import corpora, packing, rows
from selfimprove_jax.data import split as split_lib
from selfimprove_jax.pipelines.common import text
from selfimprove_jax.retrieval import embedding
from selfimprove_jax.runs import artifacts, runner, storage
from selfimprove_jax.runs.stage import Run, Stage
from selfimprove_jax.runtime.progress import Progress
from selfimprove_jax.training import checkpoint
from selfimprove_jax.training.metrics_log import MetricsLog, read_metrics
from selfimprove_jax.training.train_step import TrainState
from tests.runs.toy import stage

NAMES = [artifacts.shard_name(i, 3) for i in range(3)]


def _bytes(folder, *, but=()):
  """Path below the folder -> bytes, on a disk or in the bucket."""
  if isinstance(folder, pathlib.Path):
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
  else:
    found = fsspec.filesystem("gcs").find(str(folder))
    names = [name.removeprefix(f"{folder}/".removeprefix("gs://")) for name in found]
  return {n: (folder / n).read_bytes() for n in names if not set(but) & set(n.split("/"))}


def _packed():
  rng = np.random.default_rng(0)
  examples = [
    packing.Example(rng.integers(0, 60_000, n).astype(np.int32), np.arange(n) > 0)
    for n in rng.integers(2, 16, 40).tolist()
  ]
  return list(packing.pack(examples, seq_len=16, pad_id=0))


_EMBEDDINGS = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)


def _write(folder, *, config=None):
  """Writes what is not there yet of lines, rows and an array; gives the names of those made."""
  writer = artifacts.Writer(folder, config=config or {"seed": 0}, inputs={"corpus": "abc"})
  made = [n for n in (*NAMES, "rows.array_record", "array.zarr") if not writer.has(n)]
  for name in NAMES:
    writer.write_jsonl(name, ({"id": f"{name} {i}", "text": "naïve 文"} for i in range(20)))
  if "rows.array_record" in made:
    with writer.shard("rows.array_record") as (path, counts):
      counts.update(rows.write_rows(path, _packed()))
  if "array.zarr" in made:
    with writer.shard("array.zarr") as (path, counts):
      embedding.write_embeddings(path, _EMBEDDINGS)
      counts["records"] = len(_EMBEDDINGS)
  writer.finish({"kept": 60})
  return made


def test_paths_are_of_a_disk_or_of_google_cloud_storage():
  assert storage.path("runs/a") == pathlib.Path("runs/a")
  assert isinstance(storage.path(pathlib.Path("runs")), pathlib.Path)
  assert str(storage.path("gs://bucket/a") / "b") == "gs://bucket/a/b"
  assert storage.is_remote(storage.path(epath.Path("gs://bucket/a")))
  with pytest.raises(ValueError, match=r"s3://bucket/a is neither .* gs://bucket/folder"):
    storage.path("s3://bucket/a")


def test_an_artifact_in_a_bucket_has_the_bytes_of_one_on_a_disk_and_is_read_alike(bucket, tmp_path):
  for folder in (bucket / "a", tmp_path / "a"):
    _write(folder)
  assert _bytes(bucket / "a") == _bytes(tmp_path / "a")
  there, here = (artifacts.open_artifact(folder) for folder in (str(bucket / "a"), tmp_path / "a"))
  assert there.digest == here.digest
  assert list(there.records()) == list(here.records())
  source = rows.open_rows(there, seq_len=16)
  for index, row in enumerate(_packed()):
    np.testing.assert_array_equal(source[index]["tokens"], row["tokens"])
  store = embedding.open_embeddings(there.path("array.zarr"))
  np.testing.assert_array_equal(store.read().result(), _EMBEDDINGS)


_KILLED = """
import os, signal, sys
from selfimprove_jax.runs import artifacts

writer = artifacts.Writer(sys.argv[1], config={"seed": 0}, inputs={"corpus": "abc"})
for name in sys.argv[2:4]:
  writer.write_jsonl(name, ({"id": f"{name} {i}", "text": "naïve 文"} for i in range(20)))
with writer.shard(sys.argv[4]) as (path, counts):
  path.write_text("half")
  os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_whole_shards_and_the_next_goes_on_after_them(bucket, tmp_path):
  command = [sys.executable, "-c", _KILLED, str(bucket), *NAMES]
  process = subprocess.run(command, capture_output=True, text=True, check=False)
  assert process.returncode == -9, process.stderr
  with pytest.raises(artifacts.ArtifactError, match="unfinished"):
    artifacts.open_artifact(bucket)
  assert _write(bucket) == [NAMES[2], "rows.array_record", "array.zarr"]
  _write(tmp_path / "whole")
  assert _bytes(bucket) == _bytes(tmp_path / "whole")


def test_a_folder_that_was_uploaded_in_part_is_uploaded_again(bucket, tmp_path):
  # The state after a kill between the objects of a folder; one object is older.
  (bucket / "array.zarr" / "zarr.json").write_bytes(b"{}")
  (bucket / "array.zarr" / "left").write_bytes(b"x")
  assert "array.zarr" in _write(bucket)
  _write(tmp_path / "whole")
  assert _bytes(bucket) == _bytes(tmp_path / "whole")


@pytest.mark.parametrize(
  ("name", "damage", "message"),
  [
    (NAMES[1], lambda data: data[:-3], r"is damaged: \d+ bytes, \d+ bytes expected"),
    (NAMES[1], lambda data: data.replace(b"7", b"8", 1), r"is damaged.*SHA-256"),
    ("array.zarr/c/0/0", lambda data: b"\1" + data[1:], r"array.zarr is damaged.*SHA-256"),
    (NAMES[1], None, r"is damaged: missing"),
  ],
  ids=["shorter", "flipped", "in a folder", "missing"],
)
def test_a_damaged_object_is_refused_and_then_made_again(bucket, name, damage, message):
  _write(bucket)
  before = _bytes(bucket)
  damaged = bucket / name
  if damage is None:
    damaged.unlink()
  else:
    damaged.write_bytes(damage(damaged.read_bytes()))
  shard = name.split("/")[0]
  with pytest.raises(artifacts.ArtifactError, match=message):
    artifacts.open_artifact(bucket).path(shard)
  assert artifacts.repair(bucket) == [shard]
  assert _write(bucket) == [shard]
  assert _bytes(bucket) == before


def test_a_damaged_manifest_and_journal_in_a_bucket_cost_what_they_list(bucket):
  _write(bucket)
  before = _bytes(bucket)
  manifest = bucket / "manifest.json"
  manifest.write_bytes(manifest.read_bytes().replace(b'"kept": 60', b'"kept": 61'))
  with pytest.raises(artifacts.ArtifactError, match=r"manifest.json is damaged: its checksum"):
    artifacts.open_artifact(bucket)
  writer = artifacts.Writer(bucket, config={"seed": 0}, inputs={"corpus": "abc"})
  writer.write_jsonl("extra.jsonl", [])
  entry = bucket / "shards.jsonl" / "extra.jsonl"
  entry.write_bytes(entry.read_bytes().replace(b'"records": 0', b'"records": 1'))
  assert _write(bucket) == [*NAMES, "rows.array_record", "array.zarr"]
  storage.remove(bucket / "extra.jsonl")
  assert _bytes(bucket) == before


def test_another_config_is_refused_and_changes_nothing(bucket):
  _write(bucket)
  before = _bytes(bucket)
  with pytest.raises(artifacts.ConfigMismatchError, match=r"config\.seed: 0 -> 1"):
    _write(bucket, config={"seed": 1})
  assert _bytes(bucket) == before


def test_a_local_copy_is_used_again_unless_it_is_damaged(bucket):
  _write(bucket)
  artifact = artifacts.open_artifact(bucket)
  copies = [artifact.path("array.zarr"), artifact.path(NAMES[0])]
  before = [_bytes(copies[0]), copies[1].read_bytes()]
  storage.remove(bucket / NAMES[0])
  assert artifact.path(NAMES[0]).read_bytes() == before[1]
  (copies[0] / "zarr.json").write_bytes(b"{}")
  assert _bytes(artifact.path("array.zarr")) == before[0]


def test_two_processes_never_write_one_folder(bucket, monkeypatch):
  monkeypatch.setattr(storage, "_LEASE_SECONDS", 1.0)
  events = []

  def work(name):
    with storage.lock(bucket / "stage"):
      events.append(name)
      time.sleep(1.5)  # longer than a lease that nobody renews
      events.append(name)

  threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
  for thread in threads:
    thread.start()
    time.sleep(0.2)
  for thread in threads:
    thread.join()
  assert events == ["a", "a", "b", "b"]
  assert not (bucket / "stage" / ".lock").exists()


def test_the_lease_of_a_process_that_died_is_taken_over(bucket, monkeypatch):
  monkeypatch.setattr(storage, "_LEASE_SECONDS", 0.5)
  monkeypatch.setattr(storage, "_SETTLE_SECONDS", 0.1)
  (bucket / ".lock").write_bytes(b"host process 1 abc 7")
  began = time.monotonic()
  with storage.lock(bucket):
    assert time.monotonic() - began > 0.5
    assert not (bucket / ".lock").read_bytes().startswith(b"host")


def test_light_stages_give_the_same_bytes_in_a_bucket_as_on_a_disk(bucket, tmp_path):
  words = [f"{a}{b}" for a in "bdfgklmn" for b in ("an", "ero", "ist", "ule")]
  rng = np.random.default_rng(0)
  with (tmp_path / "corpus.jsonl").open("w") as file:
    for i in range(60):
      file.write(json.dumps({"id": f"d{i}", "text": " ".join(rng.choice(words, 30))}) + "\n")
  split = split_lib.SplitConfig(
    num_shards=2,
    validation_fraction=0.1,
    test_fraction=0.1,
    max_passage_chars=200,
    min_passage_chars=20,
    order="group",
  )
  source = corpora.JsonlConfig(paths=(str(tmp_path / "corpus.jsonl"),))
  documents = text.DocumentsConfig(corpus=text.CorpusConfig(source=source, split=split), seed=0)
  rows_config = text.RowsConfig(
    seq_len=64, unique_tokens=500, oracle_tokens=2000, max_document_tokens=60, batch_documents=7
  )
  bpe = text.TokenizerStageConfig(vocab_size=300, train_chars=5_000, unique_tokens=500)
  made = [
    Stage("documents", text.documents, documents),
    Stage("tokenizer", text.tokenizer, bpe, {"documents": "documents"}),
    Stage("tokens", text.rows, rows_config, {"documents": "documents", "tokenizer": "tokenizer"}),
  ]
  for folder in (bucket, tmp_path / "run"):
    runner.run(made, folder, progress=Progress(quiet=True), config={"title": "toy"})
    assert Run(folder, None).seconds().keys() == {"documents", "tokenizer", "tokens"}
  but = ["timings.jsonl", ".lock"]
  assert _bytes(bucket, but=but) == _bytes(tmp_path / "run", but=but)
  assert all(Run(bucket, None).has(stage.name) for stage in made)


def test_a_begun_stage_in_a_bucket_is_begun_again_with_another_config(bucket, capsys):
  with pytest.raises(ValueError, match="fails"):
    runner.run([stage("a", fails=True)], bucket, progress=Progress(quiet=True))
  runner.run([stage("a", value=3)], bucket, progress=Progress(quiet=True))
  assert "a: begun again" in capsys.readouterr().out
  assert Run(bucket, None).artifact("a").summary == {"total": 3}


@pytest.fixture
def collected():
  """Lets go, within the test, of the unawaited coroutines that orbax leaves when a read fails."""
  yield
  gc.collect()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.usefixtures("collected")
def test_checkpoints_are_restored_from_a_bucket_and_damaged_ones_set_aside(bucket):
  def state(step):
    params = {"w": jnp.arange(100.0) + step, "b": {"c": jnp.full((3, 4), step, jnp.bfloat16)}}
    return TrainState(step=jnp.int32(step), params=params, opt_state=(jnp.ones(5) * step,))

  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state(0)
  )
  with checkpoint.Checkpoints(str(bucket), keep=2) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(state(step))
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
  store = fsspec.filesystem("gcs")
  for name in store.find(str(bucket / "3" / "params")):
    if "/d/" in name:
      store.pipe_file(name, b"damaged")
  with checkpoint.Checkpoints(str(bucket), keep=2) as checkpoints:
    restored = checkpoints.restore_last(abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, state(2))
    assert checkpoints.steps() == [2]
  assert (bucket / "3.damaged" / "checksums").exists()


def test_metrics_are_in_the_bucket_when_synchronized_and_go_on_after_a_step(bucket):
  log = MetricsLog(bucket, from_step=0)
  for step in (1, 2, 3):
    log.write(step, {"train/loss": 1.0 / step})
  log.sync()
  assert [r["step"] for r in read_metrics(bucket / "metrics.jsonl")] == [1, 2, 3]
  log.close()
  log = MetricsLog(bucket, from_step=2)
  log.write(3, {"train/loss": 0.25})
  log.close()
  found = [(r["step"], r["train/loss"]) for r in read_metrics(bucket / "metrics.jsonl")]
  assert found == [(1, 1.0), (2, 0.5), (3, 0.25)]
  assert list((bucket / "tensorboard").iterdir())


def _write_file(where, text):
  storage.write_atomic(where, text.encode())


def _write_folder(where, text):
  with storage.replacing(where) as temporary:
    temporary.mkdir()
    for name in ("one", "two"):
      (temporary / name).write_text(text)


@pytest.mark.parametrize("write", [_write_file, _write_folder])
def test_many_may_write_one_path_at_once(tmp_path, write):
  errors = []

  def work(text):
    try:
      for _ in range(50):
        (tmp_path / "new").mkdir(parents=True, exist_ok=True)
        write(tmp_path / "new" / "x", text)
    except OSError as error:
      errors.append(error)

  threads = [threading.Thread(target=work, args=(text,)) for text in ("a" * 9, "b" * 9, "c")]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert errors == []
  assert [path.name for path in (tmp_path / "new").iterdir()] == ["x"]
  made = tmp_path / "new" / "x"
  found = {path.read_text() for path in (made.iterdir() if made.is_dir() else [made])}
  assert len(found) == 1 and found <= {"a" * 9, "b" * 9, "c"}


def test_who_waits_for_a_folder_says_for_whom(tmp_path, caplog):
  held, left = threading.Event(), threading.Event()

  def hold():
    with storage.lock(tmp_path / "stage"):
      held.set()
      left.wait(20)

  other = threading.Thread(target=hold)
  other.start()
  held.wait(20)
  threading.Timer(0.2, left.set).start()
  with storage.lock(tmp_path / "stage"):
    assert left.is_set()
  other.join()
  owner = rf"{socket.gethostname()} process {os.getpid()}"
  assert f"{tmp_path / 'stage'} is being written by {owner}: waiting" in caplog.text


def _is_link(root):
  (root.parent / "elsewhere").mkdir()
  root.symlink_to(root.parent / "elsewhere")


def _is_open(root):
  root.mkdir()
  root.chmod(0o777)


@pytest.mark.parametrize("plant", [_is_link, _is_open, pathlib.Path.touch])
def test_a_scratch_folder_that_others_may_write_in_is_not_used(tmp_path, monkeypatch, plant):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  planted = tmp_path / f"selfimprove_jax-{os.getuid()}"
  plant(planted)
  work = storage.scratch(epath.Path("gs://bucket/run"))
  assert planted not in work.parents
  root = work.parents[1]
  assert (root.parent, root.stat().st_mode & 0o777) == (tmp_path, 0o700)
  assert storage.scratch(epath.Path("gs://bucket/run")) == work


def test_a_scratch_folder_of_this_user_is_used_again(tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  roots = {storage.scratch(epath.Path("gs://bucket/run")).parents[1] for _ in range(2)}
  assert roots == {tmp_path / f"selfimprove_jax-{os.getuid()}"}
  [root] = roots
  assert root.stat().st_mode & 0o777 == 0o700
