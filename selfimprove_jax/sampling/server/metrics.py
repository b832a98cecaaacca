"""The server's numbers as Prometheus reads them."""

import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from selfimprove_jax.sampling.requests import Update

_PREFIX = "selfimprove"


class Times:
  """How long requests took, in seconds: to their first tokens, and to their end."""

  def __init__(self):
    self.sums = {"time_to_first_token_seconds": 0.0, "request_seconds": 0.0}
    self.counts = dict.fromkeys(self.sums, 0)

  async def watch(
    self, updates: AsyncIterator[tuple[int, Update]], began: float
  ) -> AsyncIterator[tuple[int, Update]]:
    """The updates, their times noted; only those of requests that come to their end.

    Args:
      began: of `time.monotonic`.
    """
    first = None
    async for index, update in updates:
      first = first or time.monotonic() - began
      yield index, update
    if first is not None:
      self._note("time_to_first_token_seconds", first)
      self._note("request_seconds", time.monotonic() - began)

  def _note(self, name, seconds):
    self.sums[name] += seconds
    self.counts[name] += 1


def prometheus(stats: Mapping[str, Mapping[str, Any]], times: Times) -> str:
  """Prometheus' text format.

  Args:
    stats: of `EngineService.stats`.
  """
  lines = [f"# TYPE {_PREFIX}_completions_total counter"]
  for outcome, count in sorted(stats["requests"].items()):
    lines.append(f'{_PREFIX}_completions_total{{outcome="{outcome}"}} {count}')
  for name, count in stats["now"].items():
    lines += [f"# TYPE {_PREFIX}_{name} gauge", f"{_PREFIX}_{name} {count}"]
  for name, count in sorted(_flat(stats["engine"])):
    lines += [
      f"# TYPE {_PREFIX}_engine_{name}_total counter",
      f"{_PREFIX}_engine_{name}_total {count}",
    ]
  for name in times.sums:
    lines += [
      f"# TYPE {_PREFIX}_{name} summary",
      f"{_PREFIX}_{name}_sum {times.sums[name]:.6f}",
      f"{_PREFIX}_{name}_count {times.counts[name]}",
    ]
  return "\n".join(lines) + "\n"


def _flat(counters):
  for name, value in counters.items():
    if isinstance(value, Mapping):
      yield from ((f"{name}_{inner}", count) for inner, count in _flat(value))
    else:
      yield name, value
