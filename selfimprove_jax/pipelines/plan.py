"""What a run would do, before it does it: `--dry_run`."""

from collections.abc import Sequence

from selfimprove_jax import storage
from selfimprove_jax.hardware import PEAK_FLOPS
from selfimprove_jax.pipelines import stages as stages_lib
from selfimprove_jax.pipelines.stages import Stage

UTILISATION = 0.4


def describe(
  stages: Sequence[Stage], run_folder: storage.Path | None, *, device: str | None, num_devices: int
) -> str:
  """A table: what each stage reads, tokens, FLOPs, state in device memory, and time on a device.

  Times take `UTILISATION` of the device's peak; sampling rarely reaches that.

  Raises:
    ValueError: the device kind is unknown.
  """
  if device is not None and device not in PEAK_FLOPS:
    raise ValueError(f"device {device!r} is unknown; there are {sorted(PEAK_FLOPS)}")
  header = ["stage", "reads", "tokens", "FLOPs", "state/device", "time", "done"]
  rows = [header] + [_row(stage, run_folder, device, num_devices) for stage in stages]
  total = sum(stage.plan.flops or 0 for stage in stages)
  rows.append(["total", "", "", f"{total:.2e}", "", _time(total, device, num_devices), ""])
  widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
  lines = [
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
  ]
  notes = [
    "",
    "FLOPs: causal attention counted half; blank where known only from what runs before.",
  ]
  if device:
    notes.append(f"Time: {num_devices} x {device} at {UTILISATION:.0%} of its bf16 peak.")
  return "\n".join(lines + notes)


def _row(stage, run_folder, device, num_devices):
  plan = stage.plan
  reads = ",".join(dict.fromkeys(stage.inputs.values()))
  return [
    stage.name,
    reads if len(reads) < 44 else reads[:41] + "...",
    "" if plan.tokens is None else f"{plan.tokens:,.0f}",
    "" if plan.flops is None else f"{plan.flops:.2e}",
    "" if plan.state_bytes is None else f"{plan.state_bytes / num_devices / 2**30:.3g} GiB",
    _time(plan.flops, device, num_devices),
    "yes" if run_folder and stages_lib.is_complete(stage, run_folder) else "",
  ]


def _time(flops, device, num_devices):
  if device is None or not flops:
    return ""
  seconds = flops / (PEAK_FLOPS[device] * UTILISATION * num_devices)
  for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
    if seconds >= size:
      return f"{seconds / size:.1f} {unit}"
  return f"{seconds:.2g} s"
