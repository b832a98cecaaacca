"""Compiles a config's train step, prefill and decode step for TPUs, on a machine without any.

  pip install 'selfimprove_jax[tpu]'
  python tools/compile_for.py --config=configs/sbp_3b.py:1t --topology=v5p:8x8x8
  python tools/compile_for.py --config=configs/sbp_3b.py:1t --topology=v6e:16x16 \\
      --what=train --config.training.accumulation_steps=4

Prints for each program the HBM bytes and FLOPs of one device, its collectives and whether it fits;
the last line is a JSON object with all of it. The programs are those that the pipeline runs, on the
config's mesh over all chips; each process samples by itself, so prefill (of the longest bucket) and
decode are for the chips of one host. Allocates no arrays: 3B takes 2 GB of host memory and minutes.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_flags

_REPO = pathlib.Path(__file__).resolve().parents[1]

PROGRAMS = ("train", "prefill", "decode")
# Chip -> its HBM in GB (10^9 bytes, of which the runtime reserves some), topology dimensions.
CHIPS = {"v4": (32, 3), "v5e": (16, 2), "v5p": (95, 3), "v6e": (32, 2)}


def prepare_environment() -> None:
  """Makes JAX compute on the CPU and look for no TPU; call it before jax is imported."""
  os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # several programs may compile at once: none has a TPU
  )


def topology_devices(topology: str, *, slices: int = 1) -> list[Any]:
  """Returns devices to compile for, which can hold no arrays.

  Raises:
    ValueError: there is no such topology.
    ImportError: libtpu is not installed.
  """
  chip, _, shape = topology.partition(":")
  dims = shape.split("x")
  known = CHIPS.get(chip)
  if known is None or len(dims) != known[1] or not all(d.isdecimal() and int(d) for d in dims):
    forms = [f"{name}:{'x'.join('ABC'[:n])}" for name, (_, n) in CHIPS.items()]
    raise ValueError(
      f"topology {topology!r} is unknown; it is one of {forms}, such as v5p:4x4x4 or v6e:16x16"
    )
  try:
    import libtpu  # noqa: F401
  except ImportError as error:
    raise ImportError(
      "compiling for TPUs needs libtpu: pip install 'selfimprove_jax[tpu]'"
    ) from error
  import jax
  from jax.experimental import topologies

  options = {} if slices == 1 else {"num_slices": slices}
  try:
    return list(
      topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    )
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"there is no topology {topology!r}: {error}") from None


def load(page: dict[str, Any], *, layers: int | None = None) -> Any:
  """Returns a page as the `Config` of its pipeline, with another number of layers if asked for."""
  from selfimprove_jax.pipelines import registry
  from selfimprove_jax.runtime.config import parse

  config = parse(registry.load(page.get("pipeline")).Config, page)
  if layers is not None:
    model = dataclasses.replace(config.model, num_layers=layers)
    config = dataclasses.replace(config, model=model)
  return config


def programs_of(config: Any) -> Sequence[str]:
  """Returns the programs of a config; only pipelines that sample with the model have them all."""
  samples = hasattr(getattr(config, "synthesis", None), "mesh")
  return PROGRAMS if samples else PROGRAMS[:1]


def lower(config: Any, program: str, devices: list[Any]) -> tuple[Any, dict[str, Any]]:
  """Lowers one program of a config for devices; also returns facts that need no compilation.

  Raises:
    ValueError: the config has no such program, or its mesh or batch does not fit the devices.
  """
  if program not in PROGRAMS:
    raise ValueError(f"program {program!r} is unknown; there are {PROGRAMS}")
  if program not in programs_of(config):
    raise ValueError(
      f"the pipeline {config.pipeline!r} has no `synthesis.mesh` to sample on; use --what=train"
    )
  if program == "train":
    return _lower_train(config, devices)
  return _lower_sampling(config, program, devices)


def _lower_train(config: Any, devices: list[Any]) -> tuple[Any, dict[str, Any]]:
  import jax
  import jax.numpy as jnp

  from selfimprove_jax.models.llama import Llama
  from selfimprove_jax.runtime import partitioning
  from selfimprove_jax.training import losses, train_step

  stage = _training_stage(config)
  run, training = stage.config, stage.config.training
  mesh, model = run.mesh.make(devices), Llama(run.model)
  partitioning.check_batch(
    training.batch_rows, mesh, accumulation_steps=training.accumulation_steps
  )
  learning_rate = training.learning_rate(100)
  tx = training.make_optimizer(learning_rate, weight_decay=run.weight_decay)
  step = train_step.make_train_step(
    losses.next_token_loss(model),
    model,
    tx,
    learning_rate,
    mesh,
    accumulation_steps=training.accumulation_steps,
  )
  state = train_step.abstract_state(model, tx, mesh)
  batch = {
    name: jax.ShapeDtypeStruct(
      (training.batch_rows, run.seq_len), dtype, sharding=partitioning.batch_sharding(mesh)
    )
    for name, dtype in {
      "tokens": jnp.int32,
      "positions": jnp.int32,
      "segment_ids": jnp.int32,
      "loss_mask": jnp.bool_,
    }.items()
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  with jax.set_mesh(mesh):
    lowered = step.lower(state, batch, key)
  tokens = training.batch_rows * run.seq_len
  facts = {
    "stage": stage.name,
    "batch": [training.batch_rows, run.seq_len],
    "accumulation_steps": training.accumulation_steps,
    "model_flops": tokens * run.model.train_flops_per_token(run.seq_len) / len(devices),
    "state_bytes_whole": _bytes(state),
    "state_bytes": _bytes(state, sharded=True),
  }
  return lowered, _describe(facts, run.model, mesh)


def _training_stage(config: Any) -> Any:
  """Returns the last stage that trains: an arm, or the tuned model."""
  from selfimprove_jax.pipelines import registry

  stages = registry.load(config.pipeline).stages(config)
  trains = [stage for stage in stages if hasattr(stage.config, "training")]
  if not trains:
    raise ValueError(f"the pipeline {config.pipeline!r} trains nothing")
  return trains[-1]


def _lower_sampling(config: Any, program: str, devices: list[Any]) -> tuple[Any, dict[str, Any]]:
  """Lowers a program of the engine on the mesh of one process, as each samples by itself."""
  import jax
  import jax.numpy as jnp

  from selfimprove_jax.models import decode_layout
  from selfimprove_jax.models.llama import abstract_params
  from selfimprove_jax.runtime import partitioning
  from selfimprove_jax.sampling import decode, engine

  synthesis = config.synthesis
  c = decode_layout.decode_config(config.model)
  local = [device for device in devices if device.process_index == devices[0].process_index]
  mesh = synthesis.mesh.make(local)
  B, T = synthesis.num_slots, max(synthesis.prompt_buckets)
  length = synthesis.max_length
  partitioning.check_batch(B, mesh)
  programs = decode.make_programs(c, mesh)
  params = abstract_params(decode_layout.DecodeLlama(c), mesh)
  new_rows = functools.partial(engine.new_rows, [], eos_ids=(0,), pad_id=0)
  # Not `jax.eval_shape`: inside it, a jitted function may have no compiler options.
  rows, cache = programs.make.eval_shape(new_rows(B), length=length)
  rows = _with_sharding(rows, partitioning.replicated(mesh))
  cache = _with_sharding(cache, decode.cache_sharding(mesh))
  ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
  P = decode.prefill_rows(T, num_slots=B, mesh=mesh, is_padded=True)
  with jax.set_mesh(mesh):
    if program == "prefill":
      words_P4 = jax.ShapeDtypeStruct((P, 4), jnp.uint32)
      arguments = (new_rows(P), words_P4, ints((P,)), ints((P, T)), ints((P,)))
      lowered = programs.admit.lower(params, rows, cache, *arguments)
    else:
      features = decode.Features(truncates=synthesis.sampling.truncates)
      lowered = programs.draw.lower(
        params, rows, cache, decode.Extras(), ints(()), features=features
      )
  # A prefill makes no logits. A token at the end of a full cache attends to all of it, not half.
  flops = P * T * (c.forward_flops_per_token(T) - 2 * c.vocab_size * c.embed_dim)
  if program == "decode":
    flops = B * c.forward_flops_per_token(2 * length)
  facts = {
    "batch": [P, T] if program == "prefill" else [B, 1],
    "cache_length": length,
    "model_flops": flops / len(local),
    "state_bytes_whole": _bytes(params),
    "state_bytes": _bytes(params, sharded=True),
  }
  return lowered, _describe(facts, c, mesh)


def _describe(facts: dict[str, Any], model: Any, mesh: Any) -> dict[str, Any]:
  shape = {axis: size for axis, size in mesh.shape.items() if size > 1}
  names = ("num_layers", "remat", "attention")
  return {**facts, "mesh": shape, **{name: getattr(model, name) for name in names}}


def _with_sharding(tree: Any, sharding: Any) -> Any:
  import jax

  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
  )


def _bytes(tree: Any, *, sharded: bool = False) -> int:
  import jax

  return sum(
    leaf.dtype.itemsize
    * math.prod(leaf.sharding.shard_shape(leaf.shape) if sharded else leaf.shape)
    for leaf in jax.tree.leaves(tree)
  )


def compile_and_measure(lowered: Any, *, hbm_bytes: float, fast: bool = False) -> dict[str, Any]:
  """Compiles a program; returns one device's bytes and FLOPs, and the collectives.

  `peak_bytes` adds up arguments, results that do not reuse their buffers, temporaries and code.
  XLA's FLOPs count the body of a loop once and a kernel not at all.

  Args:
    fast: compile with little optimization, and without the options of `xla_options`.
  """
  import jax

  from selfimprove_jax.runtime import xla_options
  from tools import hlo_collectives

  began = time.monotonic()
  try:
    options = {"exec_time_optimization_effort": -1.0} if fast else xla_options.OPTIONS["tpu"]
    compiled = lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return {"fits": False, "hbm_bytes": hbm_bytes, "error": str(error).splitlines()[0]}
  seconds = time.monotonic() - began
  memory = compiled.memory_analysis()
  peak = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  return {
    "fits": peak <= hbm_bytes,
    "peak_bytes": peak,
    "hbm_bytes": hbm_bytes,
    "argument_bytes": memory.argument_size_in_bytes,
    "output_bytes": memory.output_size_in_bytes,
    "reused_bytes": memory.alias_size_in_bytes,
    "temp_bytes": memory.temp_size_in_bytes,
    "xla_flops": compiled.cost_analysis()["flops"],
    "collectives": hlo_collectives.count(compiled.as_text()),
    "compile_seconds": round(seconds, 1),
  }


def compile_for(
  config: Any,
  topology: str,
  *,
  slices: int = 1,
  what: Sequence[str] | None = None,
  fast: bool = False,
  on_program: Callable[[str, dict[str, Any]], None] = lambda program, found: None,
) -> dict[str, Any]:
  """Compiles programs of a config for a topology.

  Args:
    config: the `Config` of a pipeline.
    what: the programs; None for all of `programs_of`.
    on_program: called with each program as soon as it is compiled.

  Raises:
    ValueError: see `topology_devices` and `lower`.
  """
  devices = topology_devices(topology, slices=slices)
  chip, _, shape = topology.partition(":")
  num_chips = slices * math.prod(map(int, shape.split("x")))
  programs = {}
  for program in what or programs_of(config):
    lowered, facts = lower(config, program, devices)
    # A v4 chip is two devices, each with half its memory.
    hbm_bytes = CHIPS[chip][0] * 1e9 * num_chips / len(devices)
    programs[program] = {**facts, **compile_and_measure(lowered, hbm_bytes=hbm_bytes, fast=fast)}
    on_program(program, programs[program])
  import jax

  return {
    "topology": topology,
    "slices": slices,
    "fast": fast,
    "chips": num_chips,
    "devices": len(devices),
    "jax": jax.__version__,
    "programs": programs,
  }


def _size(num_bytes: float) -> str:
  """Formats bytes with three digits: `26.5 GB`, `2.1 MB`."""
  for unit, size in (("GB", 1e9), ("MB", 1e6)):
    if num_bytes >= size:
      return f"{num_bytes / size:.3g} {unit}"
  return f"{num_bytes / 1e3:.3g} kB"


def describe(program: str, found: dict[str, Any]) -> str:
  """Formats a compiled program as a few lines of text."""
  lines = [
    f"{program}: batch {found['batch']}, mesh {found['mesh']}, {found['num_layers']} layers, "
    f"remat {found['remat']}, attention {found['attention']}"
  ]
  if "error" in found:
    return "\n".join([*lines, f"  does not fit in {_size(found['hbm_bytes'])}: {found['error']}"])
  lines += [
    f"  {'fits' if found['fits'] else 'DOES NOT FIT'}: {_size(found['peak_bytes'])} of "
    f"{_size(found['hbm_bytes'])} a device (arguments {_size(found['argument_bytes'])}, "
    f"temporaries {_size(found['temp_bytes'])})",
    f"  parameters and state: {_size(found['state_bytes'])} a device, "
    f"{_size(found['state_bytes_whole'])} in all",
    f"  FLOPs a device: {found['model_flops']:.3e} of the model, {found['xla_flops']:.3e} by XLA",
  ]
  for kind, c in sorted(found["collectives"].items()):
    lines.append(f"  {kind}: {c['count']} times, {_size(c['bytes'])} a device")
  return "\n".join([*lines, f"  compiled in {found['compile_seconds']} s"])


def define_flags() -> None:
  """Defines the flags; not on import, since `selfimprove_jax.main` has a flag `config` too."""
  config_flags.DEFINE_config_file("config", None, "Page of the run.", lock_config=True)
  flags.DEFINE_string("topology", None, "Chip and shape of the pod, such as v5p:8x8x8.")
  flags.DEFINE_integer(
    "slices", 1, "Number of pods, joined by a data center's network.", lower_bound=1
  )
  flags.DEFINE_integer("layers", None, "Compile the model with this many layers.")
  flags.DEFINE_bool("fast", False, "Compile with little optimization, in a fifth of the time.")
  flags.DEFINE_list("what", None, f"Some of {PROGRAMS}; default: all of the config.")


def main(argv: list[str]) -> None:
  given = flags.FLAGS
  if len(argv) > 1 or given.config is None or given.topology is None:
    raise app.UsageError("--config and --topology are required, and there are no other arguments")
  try:
    found = compile_for(
      load(given.config.to_dict(), layers=given.layers),
      given.topology,
      slices=given.slices,
      what=given.what,
      fast=given.fast,
      on_program=lambda program, measured: print(describe(program, measured), flush=True),
    )
  except (ValueError, ImportError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
  print(json.dumps(found))


if __name__ == "__main__":
  prepare_environment()
  sys.path[0] = str(_REPO)  # instead of tools/: modules are found as in other programs
  define_flags()
  app.run(main)
