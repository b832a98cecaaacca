"""Stages of a toy pipeline, importable by the worker processes of parallel stages."""

import dataclasses
import json
import pathlib
import time

from selfimprove_jax.runs import artifacts
from selfimprove_jax.runs.stage import Stage
from selfimprove_jax.runtime.config import section


@section
class ValueConfig:
  """Config of `write_value`.

  Attributes:
    calls: folder in which each run of the function leaves a file.
  """

  value: int = 1
  calls: str = ""
  fails: bool = False
  seconds: float = 0.0


def write_value(context, config: ValueConfig):
  """Writes `value` plus the values of the inputs."""
  if config.calls:
    folder = pathlib.Path(config.calls)
    (folder / f"{len(list(folder.iterdir()))} {context.name.replace('/', '-')}").touch()
  context.writer.write_json("first.json", 0)
  time.sleep(config.seconds)
  if config.fails:
    raise ValueError(f"value={config.value} fails")
  inputs = [artifact.summary["total"] for artifact in context.inputs.values()]
  total = config.value + sum(inputs)
  context.writer.write_json("value.json", total)
  return {"total": total}


def write_shards(context, config: ValueConfig):
  """Deals seven shards out to the processes of a job, and writes one file in all of them."""
  shards = context.shards(7, count=lambda record: {"total": record["total"]})
  for index in shards:
    shards.write_jsonl(index, [{"total": index * config.value}, {"total": index}])
  context.writer.write_jsonl("whole.jsonl", [{"x": 1}])
  assert context.writer.counts("whole.jsonl") == {"records": 1}
  return {"total": shards.totals["total"]}


def stage(name, *inputs, changes=None, **config):
  """Returns a stage of `write_value` that reads the stages named `inputs`."""
  made = Stage(name, write_value, ValueConfig(**config), {name: name for name in inputs})
  return dataclasses.replace(made, **(changes or {}))


def write_summary(folder, summary):
  """Replaces the summary of a complete artifact, as if its stage had returned this one."""
  config, manifest = (
    json.loads((folder / name).read_bytes()) for name in ("config.json", "manifest.json")
  )
  content = {"shards": manifest["shards"], "summary": summary}
  checksum = artifacts.digest([config, content])
  artifacts.write_json(folder / "manifest.json", {**content, "checksum": checksum})
