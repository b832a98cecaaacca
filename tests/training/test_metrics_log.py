import json
import struct

import pytest
from tensorboardX.proto import event_pb2

from selfimprove_jax.training import metrics_log


def _write(folder, steps, from_step=0):
  log = metrics_log.MetricsLog(folder, from_step=from_step)
  for step in steps:
    log.write(step, {"train/loss": 1 / (step + 3), "train/tokens": 100.0})
  log.close()
  return log


def _scalars(folder):
  """Reads (tag, step, value) from the TensorBoard files."""
  found = set()
  for path in (folder / "tensorboard").iterdir():
    data = path.read_bytes()
    while data:  # length, its CRC, event, its CRC
      (size,) = struct.unpack_from("<Q", data)
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      found |= {(value.tag, event.step, value.simple_value) for value in event.summary.value}
      data = data[16 + size :]
  return found


def test_every_record_is_a_line_with_its_step_and_all_digits(tmp_path):
  log = _write(tmp_path, range(3))
  assert metrics_log.read_metrics(tmp_path / "metrics.jsonl") == log.records
  assert log.records[2] == {"step": 2, "train/loss": 0.2, "train/tokens": 100.0}
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


def test_a_resumed_log_drops_later_steps_and_ends_with_the_same_bytes(tmp_path):
  whole, resumed = tmp_path / "whole", tmp_path / "resumed"
  for folder in (whole, resumed):
    folder.mkdir()
  _write(whole, range(1, 9))
  _write(resumed, range(1, 7))
  with (resumed / "metrics.jsonl").open("a") as file:
    file.write('{"step": 7, "train/lo')  # cut off by a crash
  log = _write(resumed, range(5, 9), from_step=4)
  assert (resumed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
  assert [record["step"] for record in log.records] == list(range(1, 9))


def test_a_cut_off_last_line_is_ignored_and_a_missing_file_is_empty(tmp_path):
  assert metrics_log.read_metrics(tmp_path / "metrics.jsonl") == []
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2')
  assert metrics_log.read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_the_last_loss_is_the_newest_training_loss(tmp_path):
  log = metrics_log.MetricsLog(tmp_path, from_step=0)
  assert log.last_loss is None
  log.write(1, {"train/loss": 2.5})
  log.write(1, {"validation/loss": 9.0})
  assert log.last_loss == 2.5
  log.close()


def test_tensorboard_gets_the_same_numbers_and_the_speeds_too(tmp_path):
  log = metrics_log.MetricsLog(tmp_path, from_step=0)
  log.write(1, {"train/loss": 2.5})
  log.write(2, {"train/loss": 2.25}, board=False)
  log.write_speed(2, {"tokens_per_second": 1e3, "goodput": 0.5, "mfu": None})
  log.close()
  assert _scalars(tmp_path) == {
    ("train/loss", 1, 2.5),
    ("speed/tokens_per_second", 2, 1000.0),
    ("speed/goodput", 2, 0.5),
  }
  assert "per_second" not in (tmp_path / "metrics.jsonl").read_text()
  (speed,) = metrics_log.read_metrics(tmp_path / "speed.jsonl")
  assert speed == {"step": 2, "tokens_per_second": 1000.0, "goodput": 0.5, "mfu": None}


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path):
  log = metrics_log.MetricsLog(tmp_path, from_step=0)
  log.write(1, {"train/loss": 2.5})
  log.close()
  before = (tmp_path / "metrics.jsonl").read_bytes()
  other = metrics_log.MetricsLog(tmp_path, from_step=1, writes=False)
  other.write(2, {"train/loss": 2.0})
  other.write_speed(2, {"tokens_per_second": 1e3, "goodput": 0.5, "mfu": None})
  other.close()
  assert [r["step"] for r in other.records] == [1, 2]
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def _wandb_records(path):
  """Reads the records of a `.wandb` file, which is in LevelDB's log format, in blocks of 32 KiB."""
  from wandb.proto import wandb_internal_pb2

  data, begin, parts = path.read_bytes(), 7, b""
  while begin + 7 <= len(data):
    if 32768 - begin % 32768 < 7:
      begin += 32768 - begin % 32768  # padding
      continue
    _crc, size, kind = struct.unpack_from("<IHB", data, begin)
    parts += data[begin + 7 : begin + 7 + size]
    begin += 7 + size
    if kind in (1, 4):  # whole, or the last part
      yield wandb_internal_pb2.Record.FromString(parts)
      parts = b""


def _wandb_history(folder):
  """Reads {step: metrics} and the ids of the runs from what would be uploaded."""
  found, ids = {}, set()
  for path in sorted(folder.glob("wandb/wandb/offline-run-*/*.wandb")):
    for record in _wandb_records(path):
      if record.WhichOneof("record_type") == "run":
        ids.add(record.run.run_id)
      items = {
        i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item
      }
      if items:
        step = items.pop("_step")
        found[step] = {name: value for name, value in items.items() if not name.startswith("_")}
  return found, ids


def test_weights_and_biases_gets_the_same_curve_and_goes_on_after_a_resume(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_PROJECT", "a-project")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  _write(tmp_path, range(3))
  log = _write(tmp_path, range(3, 5), from_step=2)
  found, ids = _wandb_history(tmp_path)
  assert [{"step": step, **found[step]} for step in sorted(found)] == log.records
  assert len(ids) == 1
