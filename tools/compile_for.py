"""Compiles a config's train step, prefill and decode step for a TPU pod, on a machine without one.

  pip install 'selfimprove_jax[tpu]'
  python tools/compile_for.py --config=configs/sbp_3b.py:1t --topology=v5p:8x8x8
  python tools/compile_for.py --config=configs/sbp_3b.py:1t --topology=v6e:16x16 \\
      --what=train --config.training.accumulation_steps=4

Prints, for each program, bytes of HBM and FLOPs on one device, its collectives and whether it fits;
the last line is all of that as one JSON object. The programs are those that the pipeline runs, on
the mesh that the config makes of so many chips; each process samples by itself, so prefill (of the
longest bucket) and decode are for the chips of one host. Nothing is allocated: 3B takes some 2 GB
of host memory and a few minutes.
"""

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
# Chip -> its HBM in GB (10^9 bytes; of which the runtime keeps some), and dimensions of a topology.
CHIPS = {"v4": (32, 3), "v5e": (16, 2), "v5p": (95, 3), "v6e": (32, 2)}

_OPTIMIZER = ("b1", "b2", "eps", "clip_norm", "momentum_dtype", "skip_spikes")

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Chip and shape of the pod: v5p:8x8x8.")
_SLICES = flags.DEFINE_integer(
  "slices", 1, "How many such pods, joined by a data center's network."
)
_LAYERS = flags.DEFINE_integer("layers", None, "Compile a model of so many layers instead.")
_FAST = flags.DEFINE_bool("fast", False, "Compile with little optimization: a fifth of the time.")
_WHAT = flags.DEFINE_list("what", None, f"Some of {PROGRAMS}; by default all that the config has.")


def prepare_environment() -> None:
  """Before jax is imported: compile for TPUs, compute on the CPU, and look for no TPU."""
  os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # several may compile at once: none has a TPU
  )


def topology_devices(topology: str, *, slices: int = 1) -> list[Any]:
  """Devices to compile for; they can hold no array.

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


def lower(config: dict[str, Any], program: str, devices: list[Any]) -> tuple[Any, dict[str, Any]]:
  """One program of a config, lowered for devices, and what is known of it without compiling.

  Raises:
    ValueError: the config has no such program, or its mesh or batch does not fit the devices.
  """
  if program not in PROGRAMS:
    raise ValueError(f"program {program!r} is unknown; there are {PROGRAMS}")
  if program == "train":
    return _lower_train(config, devices)
  if "synthesis" not in config:
    raise ValueError(
      f"the pipeline {config['pipeline']!r} has no stage that samples by a config's `synthesis`; "
      "use --what=train"
    )
  return _lower_sampling(config, program, devices)


def programs_of(config: dict[str, Any]) -> Sequence[str]:
  """Those that a config has: prefill and decode where a stage samples by its `synthesis`."""
  return PROGRAMS if "synthesis" in config else PROGRAMS[:1]


def _lower_train(config, devices):
  import jax
  import jax.numpy as jnp

  from selfimprove_jax import partitioning
  from selfimprove_jax.models.llama import Llama, LlamaConfig
  from selfimprove_jax.training import optimizer, train_step

  stage = _training_stage(config)
  t = stage.config["training"]
  mesh = partitioning.make_mesh(**stage.config["mesh"], devices=devices)
  partitioning.check_batch(t["batch_rows"], mesh, accumulation_steps=t["accumulation_steps"])
  model = LlamaConfig(**stage.config["model"])
  learning_rate = optimizer.warmup_cosine(
    peak_lr=t["peak_lr"], final_lr=t["final_lr"], warmup_steps=10, num_steps=100
  )
  tx = optimizer.make_optimizer(
    t["optimizer"],
    learning_rate,
    weight_decay=stage.config["weight_decay"],
    **{name: t[name] for name in _OPTIMIZER},
  )
  step = train_step.jit_train_step(
    Llama(model), tx, learning_rate, mesh, accumulation_steps=t["accumulation_steps"]
  )
  state = train_step.abstract_state(Llama(model), tx, mesh)
  batch = {
    name: jax.ShapeDtypeStruct(
      (t["batch_rows"], t["seq_len"]), dtype, sharding=partitioning.batch_sharding(mesh)
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
  tokens = t["batch_rows"] * t["seq_len"]
  known = {
    "stage": stage.name,
    "batch": [t["batch_rows"], t["seq_len"]],
    "accumulation_steps": t["accumulation_steps"],
    "model_flops": tokens * model.train_flops_per_token(t["seq_len"]) / len(devices),
    "state_bytes_whole": _bytes(state),
    "state_bytes": _bytes(state, sharded=True),
  }
  return lowered, _describe(known, model, mesh)


def _training_stage(config):
  """The last stage that trains: an arm, or the tuned model."""
  from selfimprove_jax.pipelines import runner

  runner.check(config)
  needed = {"model", "mesh", "training", "weight_decay"}
  trained = [stage for stage in runner.build(config) if needed <= stage.config.keys()]
  if not trained:
    raise ValueError(f"the pipeline {config['pipeline']!r} trains nothing")
  return trained[-1]


def _lower_sampling(config, program, devices):
  """The engine's own programs, on the mesh of one process: each samples by itself."""
  import jax
  import jax.numpy as jnp

  from selfimprove_jax import partitioning
  from selfimprove_jax.models import llama, unrolled
  from selfimprove_jax.models.params import abstract_params
  from selfimprove_jax.sampling import decode, programs, sampler, slots

  s = config["synthesis"]
  model = llama.LlamaConfig(**config["model"])
  c = unrolled.unroll_config(model)
  local = [device for device in devices if device.process_index == devices[0].process_index]
  mesh = partitioning.make_mesh(**s["mesh"], devices=local)
  B, T = s["num_slots"], max(s["prompt_buckets"])
  length = T + s["max_new_tokens"]
  partitioning.check_batch(B, mesh)
  compiled = programs.make_programs(c, mesh, steps_per_call=programs.STEPS_PER_CALL)
  params = abstract_params(llama.Llama(c), mesh)
  whole = partitioning.replicated(mesh)
  new_rows = functools.partial(slots.new_rows, [], eos_ids=(0,), pad_id=0)
  rows, cache = jax.eval_shape(functools.partial(compiled.make, length=length), new_rows(B))
  rows, cache = _laid(rows, whole), _laid(cache, programs.cache_sharding(mesh))
  ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
  P = programs.prefill_rows(T, B, mesh, is_padded=True)
  with jax.set_mesh(mesh):
    if program == "prefill":
      words_P4 = jax.ShapeDtypeStruct((P, 4), jnp.uint32)
      arguments = (new_rows(P), words_P4, ints((P,)), ints((P, T)), ints((P,)))
      lowered = compiled.admit.lower(params, rows, cache, *arguments)
    else:
      features = decode.Features(truncates=sampler.SamplingConfig(**s["sampling"]).truncates)
      lowered = compiled.draw.lower(
        params, rows, cache, decode.Extras(), ints(()), features=features
      )
  # A prefill makes no logits. A token at the end of a full cache attends to all of it, not half.
  flops = P * T * (model.forward_flops_per_token(T) - 2 * model.vocab_size * model.embed_dim)
  if program == "decode":
    flops = B * model.forward_flops_per_token(2 * length)
  known = {
    "batch": [P, T] if program == "prefill" else [B, 1],
    "cache_length": length,
    "model_flops": flops / len(local),
    "state_bytes_whole": _bytes(params),
    "state_bytes": _bytes(params, sharded=True),
  }
  return lowered, _describe(known, c, mesh)


def _describe(known, model, mesh):
  shape = {axis: size for axis, size in mesh.shape.items() if size > 1}
  names = ("num_layers", "remat", "attention")
  return {**known, "mesh": shape, **{name: getattr(model, name) for name in names}}


def _laid(tree, sharding):
  import jax

  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
  )


def _bytes(tree, *, sharded=False):
  import jax

  return sum(
    leaf.dtype.itemsize
    * math.prod(leaf.sharding.shard_shape(leaf.shape) if sharded else leaf.shape)
    for leaf in jax.tree.leaves(tree)
  )


def compile_and_measure(lowered: Any, *, hbm_bytes: float, fast: bool = False) -> dict[str, Any]:
  """Compiles; bytes and FLOPs of one device, collectives, seconds, and whether it fits.

  `peak_bytes` is arguments, results that are not written over them, temporaries and code together.
  XLA's FLOPs count a loop's body once and a kernel not at all.

  Args:
    fast: with little optimization, and without the options of `xla_options`.
  """
  import jax

  from selfimprove_jax import xla_options
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
  config: dict[str, Any],
  topology: str,
  *,
  slices: int = 1,
  layers: int | None = None,
  what: Sequence[str] | None = None,
  fast: bool = False,
  on_program: Callable[[str, dict[str, Any]], None] = lambda program, found: None,
) -> dict[str, Any]:
  """Every program of `what`, compiled for a topology.

  Args:
    what: None for all of `programs_of`.
    on_program: told of each program, as soon as it is compiled.

  Raises:
    ValueError: see `topology_devices` and `lower`.
  """
  devices = topology_devices(topology, slices=slices)
  chip, _, shape = topology.partition(":")
  num_chips = slices * math.prod(map(int, shape.split("x")))
  if layers is not None:
    config = {**config, "model": {**config["model"], "num_layers": layers}}
  programs = {}
  for program in what or programs_of(config):
    lowered, known = lower(config, program, devices)
    # A v4 chip is two devices, each with half its memory.
    hbm_bytes = CHIPS[chip][0] * 1e9 * num_chips / len(devices)
    programs[program] = {**known, **compile_and_measure(lowered, hbm_bytes=hbm_bytes, fast=fast)}
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


def describe(program: str, found: dict[str, Any]) -> str:
  """A few lines on one program, for people."""
  gb = 1e9
  lines = [
    f"{program}: batch {found['batch']}, mesh {found['mesh']}, {found['num_layers']} layers, "
    f"remat {found['remat']}, attention {found['attention']}"
  ]
  if "error" in found:
    return "\n".join(
      [*lines, f"  does not fit in {found['hbm_bytes'] / gb:.3g} GB: {found['error']}"]
    )
  lines += [
    f"  {'fits' if found['fits'] else 'DOES NOT FIT'}: {found['peak_bytes'] / gb:.2f} of "
    f"{found['hbm_bytes'] / gb:.3g} GB a device (arguments {found['argument_bytes'] / gb:.2f}, "
    f"temporaries {found['temp_bytes'] / gb:.2f})",
    f"  parameters and state: {found['state_bytes'] / gb:.3f} GB a device of "
    f"{found['state_bytes_whole'] / gb:.1f} GB",
    f"  FLOPs a device: {found['model_flops']:.3e} of the model, {found['xla_flops']:.3e} by XLA",
  ]
  for kind, c in sorted(found["collectives"].items()):
    lines.append(f"  {kind}: {c['count']} times, {c['bytes'] / gb:.3f} GB a device")
  return "\n".join([*lines, f"  compiled in {found['compile_seconds']} s"])


def main(argv: list[str]) -> None:
  if len(argv) > 1 or _CONFIG.value is None or _TOPOLOGY.value is None:
    raise app.UsageError("give --config and --topology, and nothing without a flag")
  try:
    found = compile_for(
      _CONFIG.value.to_dict(),
      _TOPOLOGY.value,
      slices=_SLICES.value,
      layers=_LAYERS.value,
      what=_WHAT.value,
      fast=_FAST.value,
      on_program=lambda program, measured: print(describe(program, measured), flush=True),
    )
  except (ValueError, ImportError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
  print(json.dumps(found))


if __name__ == "__main__":
  prepare_environment()
  sys.path[0] = str(_REPO)  # instead of tools/, so that both are found as they are elsewhere
  app.run(main)
