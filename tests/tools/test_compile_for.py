"""Compiles the configs' programs for TPU pods, and counts collectives."""

import importlib.util
import json
import os
import pathlib
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from jax.sharding import PartitionSpec

from selfimprove_jax.runtime import partitioning, xla_options
from tools import compile_for, hlo_collectives

REPO = pathlib.Path(__file__).resolve().parents[2]
_needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)"
)
# Config -> the smallest pod that its mesh fits on, with one row per chip.
_PODS = {
  "sbp_quick:quick": ("v5p:2x2x1", 4),
  "cpt_quick:quick": ("v5p:2x2x1", 4),
  "sbp_3b:1t": ("v5p:2x2x2", 8),
  "sbp_6b:1t": ("v5p:2x4x4", 32),
  "entigraph_quick:quick": ("v5p:2x2x1", 4),
  "entigraph_quality:paper": ("v5p:2x2x4", 16),
  "sft:chat": ("v5p:2x2x4", 128),  # 8 micro-batches
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


def test_every_config_that_trains_is_compiled_here():
  files = {path.stem for path in (REPO / "configs").glob("*.py")} - {
    "__init__",
    "parts",
    "paper_scale",
    "budget_forcing",  # trains nothing, as the next
    "evaluation",
  }
  assert files == {name.partition(":")[0] for name in _PODS}


@pytest.fixture(scope="module")
def smoke():
  page = runpy.run_path(str(REPO / "configs" / "sbp_quick.py"))["get_config"]("smoke")
  page.training.batch_rows = 8
  return compile_for.load(page.to_dict(), layers=3)


@pytest.fixture
def no_type_checks():
  """Lets the engine's state hold shapes instead of arrays."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
  ("program", "batch", "mesh"),
  [
    ("train", [8, 128], {"fsdp": 8}),
    ("prefill", [8, 62], {"data": 8}),
    ("decode", [64, 1], {"data": 8}),
  ],
)
def test_the_programs_of_a_page_are_lowered_with_its_batches_and_meshes(
  smoke, program, batch, mesh, no_type_checks, monkeypatch
):
  # As on a processor with AVX-512: the programs have compiler options.
  monkeypatch.setattr(xla_options, "for_platform", lambda _: {"xla_cpu_prefer_vector_width": 512})
  lowered, facts = compile_for.lower(smoke, program, jax.devices())
  assert (facts["batch"], facts["mesh"], facts["num_layers"]) == (batch, mesh, 3)
  assert "main" in lowered.as_text()
  if program == "train":
    assert facts["state_bytes"] < 0.2 * facts["state_bytes_whole"]


def test_a_program_that_a_config_lacks_is_refused(smoke):
  with pytest.raises(ValueError, match=r"'sample' is unknown.*'prefill'"):
    compile_for.lower(smoke, "sample", jax.devices())
  page = runpy.run_path(str(REPO / "configs" / "cpt_quick.py"))["get_config"]("smoke").to_dict()
  tuning = compile_for.load(page)
  assert compile_for.programs_of(tuning) == ("train",)
  with pytest.raises(ValueError, match=r"no `synthesis\.mesh`"):
    compile_for.lower(tuning, "decode", jax.devices())


@pytest.mark.slow
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
  # Norms and step counts are on every chip. All else is sharded; a replicated moment of the
  # optimizer would show.
  parts = train["mesh"].get("fsdp", 1) * train["mesh"].get("tensor", 1)
  assert train["state_bytes"] < 1.05 * train["state_bytes_whole"] / parts + 2e5
  assert train["argument_bytes"] < 3 * train["state_bytes"]  # small arrays are padded to tiles
  assert train["reused_bytes"] > 0.99 * train["state_bytes"]  # all of the state is donated
  assert train["collectives"]["all-gather"]["count"] > 0
  assert "all-to-all" not in train["collectives"]


@pytest.mark.slow
@_needs_libtpu
def test_prefill_and_decode_are_compiled_with_the_cache_in_its_shards():
  done = _run("--config=configs/sbp_quick.py:smoke", "--topology=v5e:2x2", "--what=prefill,decode")
  assert done.returncode == 0, done.stderr[-2000:]
  programs = json.loads(done.stdout.splitlines()[-1])["programs"]
  assert set(programs) == {"prefill", "decode"}
  assert all(program["fits"] for program in programs.values())
  prefill, decode = programs["prefill"], programs["decode"]
  # A full prefill of prompts of the longest bucket; and a token in each of 64 slots.
  assert prefill["batch"] == [4, 62] and decode["batch"] == [64, 1]
  # Each of a host's four chips has a quarter of the cache, and both programs update it in place.
  layers, kv_heads, head_dim = 2, 1, 16
  cache_bytes = 2 * layers * kv_heads * head_dim * decode["cache_length"] * 4 * 64 / 4
  assert decode["mesh"] == prefill["mesh"] == {"data": 4}
  assert prefill["reused_bytes"] >= cache_bytes and decode["reused_bytes"] >= cache_bytes
  # Only drawn tokens travel between chips, as every chip has all of the rows' state.
  assert "all-to-all" not in decode["collectives"]


@pytest.mark.slow
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


@pytest.mark.slow
@_needs_libtpu
def test_a_program_that_does_not_fit_is_reported_and_is_no_error():
  done = _run(
    "--config=configs/sbp_quick.py:smoke",
    "--topology=v5e:2x2",
    "--what=train",
    "--config.model.mlp_dim=1000000000",
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert "does not fit" in done.stdout.lower()
  assert not json.loads(done.stdout.splitlines()[-1])["programs"]["train"]["fits"]


@pytest.mark.parametrize(
  "topology", ["v5p", "v9:2x2", "v5p:8x8", "v6e:4x4x4", "v5e:axb", "v5e:0x2"]
)
def test_an_unknown_topology_is_refused_with_the_known_ones(topology):
  with pytest.raises(ValueError, match=rf"'{topology}' is unknown.*v4:AxBxC.*v6e:AxB"):
    compile_for.topology_devices(topology)


def test_collectives_count_once_per_iteration_and_with_the_whole_array():
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


def test_sizes_are_told_with_three_digits_whatever_they_are():
  found = {
    "batch": [4, 128],
    "mesh": {},
    "num_layers": 2,
    "remat": "none",
    "attention": "xla",
    "fits": True,
    "peak_bytes": 12_345_678,
    "hbm_bytes": 95e9,
    "argument_bytes": 2_100_000,
    "temp_bytes": 512,
    "state_bytes": 2_094_000,
    "state_bytes_whole": 16_752_000,
    "model_flops": 1e9,
    "xla_flops": 1e9,
    "collectives": {"all-gather": {"count": 3, "bytes": 40_000}},
    "compile_seconds": 1.0,
  }
  told = compile_for.describe("train", found)
  assert "fits: 12.3 MB of 95 GB a device (arguments 2.1 MB, temporaries 0.512 kB)" in told
  assert "parameters and state: 2.09 MB a device, 16.8 MB in all" in told
  assert "all-gather: 3 times, 40 kB a device" in told
