"""Describes what a run would do (`--dry_run`)."""

from collections.abc import Sequence

from selfimprove_jax.runs import storage
from selfimprove_jax.runs.stage import Stage, is_complete
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.runtime.config import choices
from selfimprove_jax.runtime.hardware import PEAK_FLOPS

UTILIZATION = 0.4
_HEADER = ["stage", "reads", "tokens", "FLOPs", "state/device", "time", "done"]


def describe(
  stages: Sequence[Stage], run_folder: storage.Path | None, *, device: str | None, num_devices: int
) -> str:
  """Returns a table of stages: inputs, tokens, FLOPs, state in device memory, time on a device.

  The total is "at least" where the cost of a stage on the devices is known only from earlier ones,
  and "at most" where that of a stage is.
  Times assume `UTILIZATION` of the device's peak; sampling rarely reaches that.

  Raises:
    ValueError: the kind of device is unknown, or a mesh does not fit the number of devices.
  """
  if device is not None and device not in PEAK_FLOPS:
    raise ValueError(f"--device={device} is unknown{choices(device, PEAK_FLOPS)}")
  rows = [_HEADER] + [_row(stage, run_folder, device, num_devices) for stage in stages]
  total = sum(stage.plan.flops or 0 for stage in stages)
  is_partial = any(stage.uses_devices and stage.plan.flops is None for stage in stages)
  is_bound = any(stage.plan.is_bound for stage in stages)
  if is_partial and is_bound:
    label = "total of what is known"
  else:
    label = "total" + (", at least" if is_partial else ", at most" if is_bound else "")
  rows.append([label, "", "", f"{total:.2e}", "", _time(total, device, num_devices), ""])
  widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
  lines = [
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
  ]
  notes = ["", "FLOPs: causal attention counts half; blank if only known from earlier stages."]
  if device:
    notes.append(f"Time: {num_devices} x {device} at {UTILIZATION:.0%} of its bf16 peak.")
  return "\n".join(lines + notes)


def _row(
  stage: Stage, run_folder: storage.Path | None, device: str | None, num_devices: int
) -> list[str]:
  plan = stage.plan
  bound = "at most " if plan.is_bound else ""
  reads = ",".join(dict.fromkeys(stage.inputs.values()))
  return [
    stage.name,
    reads if len(reads) < 44 else reads[:41] + "...",
    "" if plan.tokens is None else f"{bound}{plan.tokens:,.0f}",
    "" if plan.flops is None else f"{bound}{plan.flops:.2e}",
    "" if plan.state_bytes is None else f"{_per_device(stage, num_devices) / 2**30:.3g} GiB",
    _time(plan.flops, device, num_devices),
    "yes" if run_folder and is_complete(run_folder / stage.name) else "",
  ]


def _per_device(stage: Stage, num_devices: int) -> float:
  # The axes `dcn` and `data` replicate the state.
  for _, mesh_config in partitioning.mesh_configs(stage.config):
    sizes = mesh_config.sizes(num_devices)
    return stage.plan.state_bytes / (sizes["fsdp"] * sizes["tensor"])
  return stage.plan.state_bytes


def _time(flops: float | int | None, device: str | None, num_devices: int) -> str:
  if device is None or not flops:
    return ""
  seconds = flops / (PEAK_FLOPS[device] * UTILIZATION * num_devices)
  for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
    if seconds >= size:
      return f"{seconds / size:.1f} {unit}"
  return f"{seconds:.2g} s"
