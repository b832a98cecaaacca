"""Measures the speed of a run, and the time it loses to other work than steps.

Model FLOPs utilization (MFU) counts the model's FLOPs, not the computed ones: causal attention
half, nothing for remat, padding as tokens; over the time of the steps alone. Goodput is the share
of the time since the process began to train that went into steps.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

LOST = ("compile", "data", "evaluation", "checkpoint")


class Clock:
  """Measures the time of steps, and the time lost to everything else."""

  def __init__(
    self, *, step_tokens: int, flops_per_token: float | int, peak: tuple[float, str] | None
  ):
    """Starts the clock.

    Args:
      step_tokens: tokens per step on all devices, including padding.
      peak: FLOP/s of all devices together, and their name (`hardware.peak`); None if unknown.
    """
    self._step_tokens = step_tokens
    self._flops_per_token = flops_per_token
    self._peak = peak
    self._lost = dict.fromkeys(LOST, 0.0)
    self._steps: list[float] = []
    self._began = self._mark = time.perf_counter()
    self._lost_since_mark = 0.0

  @contextlib.contextmanager
  def lost_to(self, cause: str) -> Iterator[None]:
    """Counts the time in the context as lost to one of `LOST`."""
    began = time.perf_counter()
    try:
      yield
    finally:
      seconds = time.perf_counter() - began
      self._lost[cause] += seconds
      self._lost_since_mark += seconds

  def step_done(self) -> None:
    """Ends a step: it took the time since the last one, less the time lost in between."""
    now = time.perf_counter()
    self._steps.append(now - self._mark - self._lost_since_mark)
    self._mark, self._lost_since_mark = now, 0.0

  def summary(self, last_steps: int | None = None) -> dict[str, Any]:
    """Returns the speed of the last steps (None: all), and the time lost since the start.

    `step_seconds` are the 10th, 50th and 90th percentiles; `lost` holds shares of the time. `mfu`
    is None if no peak is known, or if it is above 1: a CPU's peak is measured, and other processes
    slowed that measurement down.
    """
    steps = np.array(self._steps[-last_steps:] if last_steps else self._steps)
    seconds = time.perf_counter() - self._began
    rate = self._step_tokens / float(np.mean(steps))
    mfu = None if self._peak is None else rate * self._flops_per_token / self._peak[0]
    found = {
      "tokens_per_second": rate,
      "mfu": None if mfu is None or mfu > 1 else mfu,
      "step_seconds": [float(x) for x in np.percentile(steps, [10, 50, 90])],
      "goodput": sum(self._steps) / seconds,
      "lost": {cause: lost / seconds for cause, lost in self._lost.items()},
    }
    if self._peak is not None:
      found["peak"] = {"flops_per_second": self._peak[0], "name": self._peak[1]}
    return found

  def line(self) -> str:
    """Returns the summary of all steps in words; empty if there were none."""
    if not self._steps:
      return ""
    found = self.summary()
    low, middle, high = found["step_seconds"]
    parts = [f"{found['tokens_per_second']:,.0f} tokens/s"]
    if self._peak is not None:
      share = "unknown, above 100%" if found["mfu"] is None else f"{found['mfu']:.1%}"
      parts.append(
        f"MFU {share} of {self._peak[0] / 1e12:.3g} TFLOP/s ({self._peak[1]}; causal attention "
        f"counted half)"
      )
    parts.append(f"step {middle:.3g} s ({low:.3g} to {high:.3g})")
    lost = ", ".join(f"{cause} {share:.1%}" for cause, share in found["lost"].items())
    parts.append(f"goodput {found['goodput']:.1%} (lost: {lost})")
    return "; ".join(parts)
