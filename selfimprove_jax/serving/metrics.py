"""The server's metrics, in Prometheus' text format."""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from selfimprove_jax.sampling.requests import Update

_PREFIX = "selfimprove"
_HELP = {
  "time_to_first_token_seconds": "From a request's arrival to its first tokens.",
  "request_seconds": "From a request's arrival to its end.",
}
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
  """Counters and gauges of the service, and how long requests took."""

  def __init__(self, stats: Callable[[], Mapping[str, Mapping[str, Any]]]):
    """Args:
    stats: `EngineService.stats`.
    """
    prometheus_client.disable_created_metrics()  # one more gauge for each summary
    self._registry = prometheus_client.CollectorRegistry(auto_describe=False)
    self._registry.register(_Service(stats))
    self._seconds = {
      name: prometheus_client.Summary(name, text, namespace=_PREFIX, registry=self._registry)
      for name, text in _HELP.items()
    }

  async def watch(
    self, updates: AsyncIterator[tuple[int, Update]], began: float
  ) -> AsyncIterator[tuple[int, Update]]:
    """Passes updates on and records their times, for requests that finish.

    Args:
      began: when the request arrived, by `time.monotonic`.
    """
    first = None
    async for index, update in updates:
      first = first or time.monotonic() - began
      yield index, update
    if first is not None:
      self._seconds["time_to_first_token_seconds"].observe(first)
      self._seconds["request_seconds"].observe(time.monotonic() - began)

  def text(self) -> bytes:
    """Returns the page that Prometheus scrapes."""
    return prometheus_client.generate_latest(self._registry)


class _Service:
  """A collector that reads the service's own counts when Prometheus asks."""

  def __init__(self, stats: Callable[[], Mapping[str, Mapping[str, Any]]]):
    self._stats = stats

  def collect(self) -> Iterator[Metric]:
    stats = self._stats()
    completions = CounterMetricFamily(
      f"{_PREFIX}_completions", "Completions by outcome.", labels=["outcome"]
    )
    for outcome, count in sorted(stats["requests"].items()):
      completions.add_metric([outcome], count)
    yield completions
    for name, count in stats["now"].items():
      yield GaugeMetricFamily(f"{_PREFIX}_{name}", f"Completions {name}.", value=count)
    for name, count in sorted(stats["engine"].items()):
      yield CounterMetricFamily(
        f"{_PREFIX}_engine_{name}", f"The engine's count of {name}.", value=count
      )
