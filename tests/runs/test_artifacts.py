"""Writing, resuming, damaging and reading artifacts."""

import json
import pathlib
import subprocess
import sys

import pytest

from selfimprove_jax.runs import artifacts

CONFIG = {"seed": 0, "filters": {"min_tokens": 32, "max_copies": 4}}
INPUTS = {"corpus": "abc"}
NAMES = [artifacts.shard_name(i, 4) for i in range(4)]


def _writer(folder, config=CONFIG, inputs=INPUTS):
  return artifacts.Writer(folder, config=config, inputs=inputs)


def _records(name):
  return [{"id": f"{name}-{i}", "text": "naïve 文"} for i in range(int(name[4]) + 1)]


def _write(folder, names=NAMES, finish=True):
  """Writes the shards that are not there yet; gives the names of those it made."""
  writer = _writer(folder)
  made = [name for name in names if not writer.has(name)]
  for name in names:
    writer.write_jsonl(name, _records(name))
  if finish:
    writer.finish({"records": 10})
  return made


def _bytes(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


@pytest.fixture
def whole(tmp_path):
  """The bytes of an artifact that was written without interruption."""
  _write(tmp_path / "whole")
  return _bytes(tmp_path / "whole")


def test_a_reader_gets_every_record_in_order_and_no_rejected_ones(tmp_path):
  writer = _writer(tmp_path)
  for name in reversed(NAMES):
    writer.write_jsonl(name, _records(name))
  writer.write_jsonl("_dropped.jsonl", [{"id": "dropped"}])
  writer.write_json("counts.json", {"pages": 3})
  writer.finish({"kept": 10})
  artifact = artifacts.open_artifact(tmp_path)
  assert list(artifact.records()) == [record for name in NAMES for record in _records(name)]
  assert list(artifact.read_jsonl("_dropped.jsonl")) == [{"id": "dropped"}]
  assert artifact.summary == {"kept": 10}
  assert artifact.shards[NAMES[2]]["records"] == 3


def test_an_interrupted_writer_goes_on_after_its_whole_shards(tmp_path, whole):
  folder = tmp_path / "interrupted"
  _write(folder, NAMES[:2], finish=False)
  # The state that a SIGKILL in the middle of the third shard leaves.
  (folder / f".{NAMES[2]}.tmp").write_text('{"id": "half')
  assert _write(folder) == NAMES[2:]
  assert _bytes(folder) == whole


def test_a_shard_whose_writing_fails_does_not_appear(tmp_path, whole):
  folder = tmp_path / "interrupted"

  def failing():
    yield {"id": "a"}
    raise RuntimeError("the generator broke")

  with pytest.raises(RuntimeError, match="the generator broke"):
    _writer(folder).write_jsonl(NAMES[0], failing())
  assert list(_bytes(folder)) == ["config.json"]
  assert _write(folder) == NAMES
  assert _bytes(folder) == whole


@pytest.mark.parametrize("end", [-2, -30, 5])
@pytest.mark.parametrize("rest", [b"", b"\0\0\0\n", b'{"name": "x"\n'], ids=["cut", "nul", "junk"])
def test_a_torn_line_of_the_journal_costs_only_its_shard(tmp_path, whole, end, rest):
  folder = tmp_path / "interrupted"
  _write(folder, NAMES[:3], finish=False)
  journal = folder / "shards.jsonl"
  *lines, last = journal.read_bytes().splitlines(keepends=True)
  journal.write_bytes(b"".join(lines) + last[:end] + rest)
  assert _write(folder) == NAMES[2:]
  assert _bytes(folder) == whole


def test_a_shard_damaged_before_the_end_is_written_again(tmp_path, whole):
  folder = tmp_path / "interrupted"
  _write(folder, NAMES[:3], finish=False)
  (folder / NAMES[0]).write_text("same size"[:9])
  (folder / NAMES[1]).unlink()
  assert _write(folder) == [NAMES[0], NAMES[1], NAMES[3]]
  assert _bytes(folder) == whole


def test_a_shard_cut_after_the_end_is_refused_then_repaired_to_the_same_bytes(tmp_path, whole):
  folder = tmp_path / "whole"
  shard = folder / NAMES[1]
  shard.write_bytes(shard.read_bytes()[:-3])
  with pytest.raises(artifacts.ArtifactError, match=rf"{NAMES[1]} is damaged: \d+ bytes, \d+"):
    artifacts.open_artifact(folder)
  assert artifacts.repair(folder) == [NAMES[1]]
  with pytest.raises(artifacts.ArtifactError, match="unfinished"):
    artifacts.open_artifact(folder)
  assert _write(folder) == [NAMES[1]]
  assert _bytes(folder) == whole


def test_a_changed_byte_is_noticed_when_the_shard_is_read_and_repaired(tmp_path, whole):
  folder = tmp_path / "whole"
  shard = folder / NAMES[3]
  shard.write_bytes(shard.read_bytes().replace(b"3", b"4", 1))
  artifact = artifacts.open_artifact(folder)
  with pytest.raises(artifacts.ArtifactError, match=rf"{NAMES[3]} is damaged.*SHA-256"):
    list(artifact.records())
  assert artifacts.repair(folder) == [NAMES[3]]
  assert _write(folder) == [NAMES[3]]
  assert _bytes(folder) == whole


def test_an_empty_shard_that_went_missing_is_noticed_too(tmp_path):
  _writer(tmp_path).write_jsonl("_dropped.jsonl", [])
  (tmp_path / "_dropped.jsonl").unlink()
  writer = _writer(tmp_path)
  assert not writer.has("_dropped.jsonl")
  writer.write_jsonl("_dropped.jsonl", [])
  writer.finish()
  (tmp_path / "_dropped.jsonl").unlink()
  with pytest.raises(artifacts.ArtifactError, match=r"_dropped.jsonl is damaged: missing"):
    artifacts.open_artifact(tmp_path)


def test_repair_leaves_a_whole_artifact_alone(tmp_path, whole):
  assert artifacts.repair(tmp_path / "whole") == []
  assert _bytes(tmp_path / "whole") == whole


def test_a_missing_or_unfinished_artifact_is_not_read(tmp_path):
  with pytest.raises(artifacts.ArtifactError, match=r"absent is missing: run the stage"):
    artifacts.open_artifact(tmp_path / "absent")
  _write(tmp_path / "begun", NAMES, finish=False)
  with pytest.raises(artifacts.ArtifactError, match=r"begun is unfinished: run the stage"):
    artifacts.open_artifact(tmp_path / "begun")


def test_an_unknown_shard_is_refused_with_the_known_ones(tmp_path):
  _write(tmp_path)
  with pytest.raises(artifacts.ArtifactError, match=rf"no shard 'x.jsonl'.*{NAMES[0]}"):
    artifacts.open_artifact(tmp_path).path("x.jsonl")


@pytest.mark.parametrize("finish", [True, False], ids=["finished", "unfinished"])
def test_another_config_or_input_is_refused_with_every_difference(tmp_path, finish):
  _write(tmp_path, finish=finish)
  before = _bytes(tmp_path)
  config = {"seed": 0, "filters": {"min_tokens": 64}, "new": True}
  with pytest.raises(artifacts.ConfigMismatchError) as raised:
    _writer(tmp_path, config, {"corpus": "abd"})
  assert str(raised.value).splitlines()[-4:] == [
    "  config.filters.max_copies: 4 -> (absent)",
    "  config.filters.min_tokens: 32 -> 64",
    "  config.new: (absent) -> True",
    "  inputs.corpus: 'abc' -> 'abd'",
  ]
  assert _bytes(tmp_path) == before


def test_the_same_config_in_another_order_of_keys_or_with_tuples_is_the_same(tmp_path):
  _writer(tmp_path, {"a": 1, "b": [1, 2]})
  _writer(tmp_path, {"b": (1, 2), "a": 1})


_FILL = """
import pathlib, resource, sys
import numpy as np
from selfimprove_jax.runs import artifacts
from selfimprove_jax.data import packing, rows

folder, limit = pathlib.Path(sys.argv[1]), int(sys.argv[2])
tokens = np.random.default_rng(0).integers(0, 60_000, 4000).astype(np.int32)
examples = [packing.Example(tokens, np.ones(len(tokens), bool))] * 10
packed = list(packing.pack(examples, seq_len=4000, pad_id=0))
# Python ignores SIGXFSZ, so what is over the limit fails as on a full disk.
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
writer = artifacts.Writer(folder, config={}, inputs={})
writer.write_jsonl("small.jsonl", [{"text": "x" * 100}])
if not writer.has("rows.array_record"):
  with writer.shard("rows.array_record") as (path, counts):
    counts.update(rows.write_rows(path, packed))
if not writer.has("big.npy"):
  with writer.shard("big.npy") as (path, counts), path.open("wb") as file:
    np.save(file, tokens[None].repeat(30, 0))
writer.write_jsonl("big.jsonl", ({"text": "x" * 1000} for _ in range(1000)))
writer.finish()
"""


def test_a_full_disk_names_the_shard_leaves_nothing_half_written_and_can_be_resumed(tmp_path):
  folder = tmp_path / "a"

  def fill(folder, limit):
    command = [sys.executable, "-c", _FILL, str(folder), str(limit)]
    return subprocess.run(command, capture_output=True, text=True, check=False)

  kept = {"config.json", "shards.jsonl", "small.jsonl"}
  sizes = {"rows.array_record": 50_000, "big.npy": 450_000, "big.jsonl": 900_000}
  for name, limit in sizes.items():
    last_line = fill(folder, limit).stderr.splitlines()[-1]
    assert last_line.startswith(f"OSError: could not write shard {name} of {folder}: "), last_line
    assert "make room, and run the same command again" in last_line
    assert set(_bytes(folder)) == kept
    kept.add(name)
  assert fill(folder, 100_000_000).returncode == 0
  assert set(_bytes(folder)) == kept - {"shards.jsonl"} | {"manifest.json"}
  assert artifacts.open_artifact(folder).shards["big.jsonl"]["records"] == 1000


def test_an_error_of_what_is_written_is_not_taken_for_a_full_disk(tmp_path):
  writer = _writer(tmp_path)
  with pytest.raises(artifacts.ArtifactError, match=r"^input damaged$"), writer.shard("a.jsonl"):
    raise artifacts.ArtifactError("input damaged")


def test_a_folder_is_a_shard_and_its_damage_is_noticed(tmp_path):
  def write(folder):
    writer = _writer(folder)
    if not writer.has("0.zarr"):
      with writer.shard("0.zarr") as (path, counts):
        (path / "c").mkdir(parents=True)
        (path / "c" / "0").write_bytes(b"chunk")
        (path / "zarr.json").write_text("{}")
        counts["records"] = 5
    return writer.finish()

  artifact = write(tmp_path / "a")
  assert (artifact.path("0.zarr") / "c" / "0").read_bytes() == b"chunk"
  assert artifact.shards["0.zarr"]["bytes"] == 7
  assert artifact.digest == write(tmp_path / "b").digest
  (tmp_path / "a" / "0.zarr" / "c" / "0").rename(tmp_path / "a" / "0.zarr" / "c" / "1")
  with pytest.raises(artifacts.ArtifactError, match=r"0.zarr is damaged"):
    artifact.path("0.zarr")
  assert artifacts.repair(tmp_path / "a") == ["0.zarr"]
  assert write(tmp_path / "a").digest == write(tmp_path / "b").digest
  assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")


def test_the_digest_depends_on_config_inputs_and_content_and_on_nothing_else(tmp_path):
  def digest(name, config=CONFIG, inputs=INPUTS, records=({"id": 1},), summary=None):
    writer = _writer(tmp_path / name, config, inputs)
    writer.write_jsonl(NAMES[0], records)
    return writer.finish(summary).digest

  same = digest("a")
  assert same == "798a976048bc7f6961db4040f3cff0ddb7f4b6ccd7e54d041eaf1768ea96b4ea"
  assert digest("b", dict(reversed(CONFIG.items()))) == same
  others = [
    digest("c", {"seed": 1}),
    digest("d", inputs={"corpus": "abd"}),
    digest("e", records=({"id": 2},)),
    digest("f", summary={"kept": 1}),
  ]
  assert len({same, *others}) == 5


def test_write_atomic_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
  path = tmp_path / "x.json"
  artifacts.write_json(path, {"a": 1})

  def fails(self, data):
    raise OSError("no room")

  monkeypatch.setattr(pathlib.Path, "write_bytes", fails)
  with pytest.raises(OSError, match="no room"):
    artifacts.write_json(path, {"a": 2})
  assert json.loads(path.read_text()) == {"a": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_writer_with_scratch_keeps_the_same_books_and_writes_nothing(tmp_path):
  folder = tmp_path / "made"
  writer = artifacts.Writer(folder, config={}, inputs={})
  writer.write_jsonl("a.jsonl", [{"x": 1}])
  other = artifacts.Writer(folder, config={}, inputs={}, scratch=tmp_path / "scratch")
  before = sorted(folder.iterdir())
  assert other.has("a.jsonl")
  assert not other.has("b.jsonl")
  other.write_jsonl("b.jsonl", [{"x": 2}, {"x": 3}])
  assert other.has("b.jsonl")
  assert other.counts("b.jsonl") == {"records": 2}
  assert [r["x"] for n in ("a.jsonl", "b.jsonl") for r in other.read_jsonl(n)] == [1, 2, 3]
  assert other.finish({}) is None
  assert sorted(folder.iterdir()) == before


def test_a_writer_with_scratch_needs_no_file_of_what_the_main_process_writes(tmp_path):
  artifacts.Writer(tmp_path / "made", config={}, inputs={})
  other = artifacts.Writer(tmp_path / "made", config={}, inputs={}, scratch=tmp_path / "scratch")
  with other.shard("model") as (_, counts):
    counts["records"] = 1
  assert other.counts("model") == {"records": 1}


def test_a_cleared_artifact_can_be_begun_with_another_config(tmp_path):
  _write(tmp_path, finish=False)
  assert artifacts.read_config(tmp_path) == CONFIG
  artifacts.clear(tmp_path)
  assert list(tmp_path.iterdir()) == []
  assert artifacts.read_config(tmp_path) is None
  _writer(tmp_path, {"seed": 1})


@pytest.mark.parametrize(
  ("name", "damage"),
  [
    ("manifest.json", lambda data: data.replace(b'"records": 10', b'"records": 11')),
    ("manifest.json", lambda data: data.replace(b'"records": 3', b'"records": 4')),
    ("manifest.json", lambda data: data.replace(b'"checksum"', b'"checksun"')),
    ("manifest.json", lambda data: data[:-40]),
    ("manifest.json", lambda data: b"{}"),
    ("manifest.json", lambda data: b"\xff" + data),
    ("manifest.json", lambda data: b"[" * 100_000),
    ("manifest.json", lambda data: data.replace(b"\n ", b"\n\t", 1)),
    ("config.json", lambda data: data.replace(b'"abc"', b'"abd"')),
    ("config.json", lambda data: data[1:]),
    ("config.json", lambda data: None),
  ],
)
def test_a_damaged_manifest_or_config_is_refused_by_name(tmp_path, name, damage):
  _write(tmp_path)
  path = tmp_path / name
  data = damage(path.read_bytes())
  if data is None:
    path.unlink()
  else:
    assert data != path.read_bytes()
    path.write_bytes(data)
  with pytest.raises(artifacts.ArtifactError, match=rf"is damaged.*{name}|{name} is damaged"):
    artifacts.open_artifact(tmp_path)
  assert name in artifacts.damage(tmp_path)


@pytest.mark.parametrize(
  "damage",
  [
    lambda line: line.replace(b'"records": 2', b'"records": 3'),
    lambda line: line.replace(b'"name"', b'"nama"'),
    lambda line: b"{}\n",
    lambda line: b"\xff" + line,
    lambda line: line[:-1],
  ],
  ids=["count", "key", "empty", "no UTF-8", "no newline"],
)
def test_a_damaged_line_inside_the_journal_is_named_and_costs_its_shards(tmp_path, whole, damage):
  folder = tmp_path / "interrupted"
  _write(folder, NAMES[:3], finish=False)
  journal = folder / "shards.jsonl"
  lines = journal.read_bytes().splitlines(keepends=True)
  assert damage(lines[1]) != lines[1]
  journal.write_bytes(lines[0] + damage(lines[1]) + lines[2])
  [told] = _writer(folder).repaired
  assert told.startswith(f"{journal} has 1 damaged lines")
  assert NAMES[1] in _write(folder)
  assert _bytes(folder) == whole


def test_an_unfinished_artifact_whose_config_is_damaged_is_begun_again(tmp_path, whole):
  folder = tmp_path / "interrupted"
  _write(folder, NAMES[:3], finish=False)
  (folder / "config.json").write_bytes(b"\xff")
  assert artifacts.read_config(folder) is None
  assert _write(folder) == NAMES
  assert _bytes(folder) == whole
