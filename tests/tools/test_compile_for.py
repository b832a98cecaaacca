"""Every shipped config compiled for a TPU pod at two layers; and what is counted in the result."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from selfimprove_jax import partitioning
from tools import compile_for, hlo_collectives

REPO = pathlib.Path(__file__).resolve().parents[2]
_needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)"
)
# Config -> the smallest pod that its mesh divides over, with one row a chip.
_PODS = {
  "sbp_quick:quick": ("v5p:2x2x1", 4),
  "cpt_quick:quick": ("v5p:2x2x1", 4),
  "sbp_3b:1t": ("v5p:2x2x2", 8),
  "sbp_6b:1t": ("v5p:2x4x4", 32),
  "entigraph_8b:paper": ("v5p:2x2x4", 16),
}


def _run(*arguments):
  environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
  return subprocess.run(
    [sys.executable, "tools/compile_for.py", "--fast", *arguments],
    cwd=REPO,
    env=environment,
    capture_output=True,
    text=True,
  )


def test_every_config_is_compiled_here():
  files = {path.stem for path in (REPO / "configs").glob("*.py")} - {
    "__init__",
    "parts",
    "paper_scale",
    "budget_forcing",  # trains nothing
  }
  assert files == {name.partition(":")[0] for name in _PODS}


@_needs_libtpu
@pytest.mark.parametrize("config", _PODS)
def test_the_train_step_of_every_config_fits_and_its_state_is_sharded(config):
  topology, rows = _PODS[config]
  name, _, variant = config.partition(":")
  done = _run(
    f"--config=configs/{name}.py:{variant}",
    f"--topology={topology}",
    "--layers=2",
    "--what=train",
    f"--config.training.batch_rows={rows}",
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout.splitlines()[-1])
  train = found["programs"]["train"]
  assert train["fits"]
  # Norms and step counts are on every chip; all else is divided, so that a moment of the optimizer
  # that was left whole would show.
  parts = train["mesh"].get("fsdp", 1) * train["mesh"].get("tensor", 1)
  assert train["state_bytes"] < 1.05 * train["state_bytes_whole"] / parts + 2e5
  assert train["argument_bytes"] < 3 * train["state_bytes"]  # small arrays fill whole tiles
  assert train["reused_bytes"] > 0.99 * train["state_bytes"]  # the state is donated, all of it
  assert train["collectives"]["all-gather"]["count"] > 0
  assert "all-to-all" not in train["collectives"]


@_needs_libtpu
def test_prefill_and_decode_are_compiled_with_the_cache_in_its_shards():
  done = _run("--config=configs/sbp_quick.py:smoke", "--topology=v5e:2x2", "--what=prefill,decode")
  assert done.returncode == 0, done.stderr[-2000:]
  programs = json.loads(done.stdout.splitlines()[-1])["programs"]
  assert set(programs) == {"prefill", "decode"}
  assert all(program["fits"] for program in programs.values())
  prefill, decode = programs["prefill"], programs["decode"]
  # The longest bucket, as many prompts as make a prefill; and a token in each of 64 slots.
  assert prefill["batch"] == [4, 62] and decode["batch"] == [64, 1]
  # A host of four chips holds the slots' cache in quarters, and both write over it.
  layers, kv_heads, head_dim = 2, 1, 16
  cache_bytes = 2 * layers * kv_heads * head_dim * decode["cache_length"] * 4 * 64 / 4
  assert decode["mesh"] == prefill["mesh"] == {"data": 4}
  assert prefill["reused_bytes"] >= cache_bytes and decode["reused_bytes"] >= cache_bytes
  # Rows that a process samples by itself are on all its chips alike: tokens go to no other chip but
  # those that were drawn.
  assert "all-to-all" not in decode["collectives"]


@_needs_libtpu
def test_decode_keeps_no_second_copy_of_the_cache():
  done = _run(
    "--config=configs/sbp_3b.py:1t", "--topology=v5p:2x2x1", "--layers=1", "--what=decode"
  )
  assert done.returncode == 0, done.stderr[-2000:]
  decode = json.loads(done.stdout.splitlines()[-1])["programs"]["decode"]
  cache_bytes = 2 * 8 * 128 * decode["cache_length"] * 2 * 128 / 4
  assert decode["reused_bytes"] >= cache_bytes
  assert decode["temp_bytes"] < cache_bytes / 2


@_needs_libtpu
def test_what_does_not_fit_is_said_and_not_an_error():
  done = _run(
    "--config=configs/sbp_quick.py:smoke",
    "--topology=v5e:2x2",
    "--what=train",
    "--config.training.batch_rows=4000000",
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert "does not fit" in done.stdout.lower()
  assert not json.loads(done.stdout.splitlines()[-1])["programs"]["train"]["fits"]


@pytest.mark.parametrize(
  "topology", ["v5p", "v9:2x2", "v5p:8x8", "v6e:4x4x4", "v5e:axb", "v5e:0x2"]
)
def test_an_unknown_topology_is_refused_with_those_there_are(topology):
  with pytest.raises(ValueError, match=rf"'{topology}' is unknown.*v4:AxBxC.*v6e:AxB"):
    compile_for.topology_devices(topology)


def test_collectives_are_counted_as_often_as_their_loop_runs_and_with_the_whole_array():
  mesh = partitioning.make_mesh(data=1, fsdp=8, tensor=1)

  def program(x, w):
    def body(carry, _):
      return jnp.tanh(jax.lax.psum(carry, "fsdp")), None

    carry, _ = jax.lax.scan(body, x, None, length=5)
    return (
      carry,
      jax.lax.all_gather(w, "fsdp", tiled=True),
      jax.lax.psum_scatter(w, "fsdp", tiled=True),
    )

  split = jax.shard_map(
    program,
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec("fsdp")),
    out_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("fsdp")),
    check_vma=False,
  )
  x, w = jnp.ones((4, 6), jnp.float32), jnp.ones((64 * 8, 3), jnp.float32)
  assert hlo_collectives.count(jax.jit(split).lower(x, w).compile().as_text()) == {
    "all-reduce": {"count": 5, "bytes": 5 * 4 * 6 * 4},
    "all-gather": {"count": 1, "bytes": 64 * 8 * 3 * 4},
    "reduce-scatter": {"count": 1, "bytes": 64 * 3 * 4},
  }
