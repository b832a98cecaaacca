"""Shows the progress of long work: live bars on a terminal, a plain line every few seconds in logs.

  progress = Progress()
  with progress.track(1500, label="seed", unit="steps") as bar:
    bar.update(1, loss=4.21, tokens_per_second=18_300)

prints, in a log,

  seed  412/1,500 steps  27%  18.3k tokens/s  loss 4.21  0:41 left

It shows wall-clock time, so no artifact may be made from it.
"""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

_LIVE_SECONDS = 0.1  # between redraws of a live bar
_RATE_SUFFIX = "_per_second"


class Bar:
  """Counts the units of one piece of work; made by `Progress.track`."""

  def __init__(
    self,
    total: int | None,
    *,
    label: str,
    unit: str,
    start: int,
    every: float,
    draw: Callable[["Bar"], None],
  ):
    self._total = total
    self._label = label
    self._unit = unit
    self._start = start
    self._done = start
    self._fields: dict[str, Any] = {}
    self._every = every
    self._draw = draw
    self._began = time.monotonic()
    self._next = self._began + every

  def update(self, num: int = 1, **fields: Any) -> None:
    """Counts `num` more units as done.

    Args:
      num: units done since the last call.
      fields: numbers to show, the last of each name; one called `X_per_second` is shown as `X/s`
        and replaces our own rate. They are converted to floats only when a line is drawn, so a
        device array does not block in between.
    """
    self._done += num
    if fields:
      self._fields |= fields
    now = time.monotonic()
    if now >= self._next:
      self._next = now + self._every
      self._draw(self)

  @property
  def done(self) -> int:
    return self._done

  def status(self, *, finished: bool = False) -> str:
    """Returns the line that describes the work now."""
    seconds = time.monotonic() - self._began
    rate = (self._done - self._start) / seconds if seconds > 0 else 0.0
    parts = [self._label]
    if self._total is None:
      parts.append(f"{self._done:,} {self._unit}")
    else:
      parts.append(f"{self._done:,}/{self._total:,} {self._unit}")
      parts.append(f"{100 * self._done // self._total if self._total else 100}%")
    rates = {k: v for k, v in self._fields.items() if k.endswith(_RATE_SUFFIX)}
    if not rates and rate > 0:
      parts.append(f"{_short(rate)} {self._unit}/s")
    parts += [f"{_short(v)} {k.removesuffix(_RATE_SUFFIX)}/s" for k, v in rates.items()]
    parts += [f"{k} {float(v):.3g}" for k, v in self._fields.items() if k not in rates]
    if finished:
      parts.append(f"in {_clock(seconds)}")
    elif self._total is not None and rate > 0:
      parts.append(f"{_clock((self._total - self._done) / rate)} left")
    return "  ".join(parts)


class Progress:
  """Shows the work of one process; several bars may be open at the same time.

  Attributes:
    QUIET: shows nothing.
  """

  QUIET: ClassVar["Progress"]

  def __init__(
    self, *, quiet: bool = False, every_seconds: float = 5.0, stream: io.TextIOBase | None = None
  ):
    """Chooses where and how often to show it.

    Args:
      quiet: show nothing, as in all but the main process of a job.
      every_seconds: minimum time between two plain lines of one bar.
      stream: where to write; standard error if None.

    Raises:
      ValueError: `every_seconds` is negative.
    """
    if every_seconds < 0:
      raise ValueError(f"every_seconds is {every_seconds}; it must be 0 or more")
    self._quiet = quiet
    self._every = every_seconds
    self._stream = sys.stderr if stream is None else stream
    self._live: Any = None
    self._num_open = 0

  @contextlib.contextmanager
  def track(self, total: int | None, label: str, unit: str, *, start: int = 0) -> Iterator[Bar]:
    """Shows a bar within the context, and one closing line unless an error ends it.

    Args:
      total: number of units, including `start`; None if unknown.
      label: the stage or arm.
      unit: the plural of what is counted.
      start: units that an earlier run did; they count as done but not toward the rate.

    Raises:
      ValueError: `total` is negative, or `start` is not between 0 and `total`.
    """
    if total is not None and total < 0:
      raise ValueError(f"total of {label!r} is {total}; it must be 0 or more, or None")
    if start < 0 or (total is not None and start > total):
      raise ValueError(f"start of {label!r} is {start}; it must be between 0 and {total}")
    if self._quiet:
      every, show = float("inf"), contextlib.nullcontext(_nothing)
    elif self._stream.isatty():
      every, show = _LIVE_SECONDS, self._live_bar(total, start)
    else:
      every, show = self._every, contextlib.nullcontext(self._print)
    with show as draw:
      bar = Bar(total, label=label, unit=unit, start=start, every=every, draw=draw)
      yield bar
    if not self._quiet:
      self._print(bar, finished=True)

  def note(self, text: str) -> None:
    """Prints a line between the bars."""
    if not self._quiet:
      print(text, file=self._stream, flush=True)

  def _print(self, bar: Bar, *, finished: bool = False) -> None:
    print(bar.status(finished=finished), file=self._stream, flush=True)

  @contextlib.contextmanager
  def _live_bar(self, total: int | None, start: int) -> Iterator[Callable[[Bar], None]]:
    import rich.console
    import rich.progress

    if self._live is None:
      self._live = rich.progress.Progress(
        rich.progress.BarColumn(bar_width=24),
        rich.progress.TextColumn("{task.description}", markup=False),
        console=rich.console.Console(file=self._stream),
        transient=True,
        auto_refresh=False,  # no thread: `update` redraws
      )
      self._live.start()
    task = self._live.add_task("", total=total, completed=start)
    self._num_open += 1
    live = self._live
    try:
      yield lambda bar: live.update(
        task, description=bar.status(), completed=bar.done, refresh=True
      )
    finally:
      live.remove_task(task)
      self._num_open -= 1
      if self._num_open == 0:
        live.stop()
        self._live = None


Progress.QUIET = Progress(quiet=True)


def _nothing(bar: Bar) -> None:
  del bar


def _short(number: Any) -> str:
  """Formats a number with three digits and a suffix, such as 18.3k."""
  number = float(number)
  for suffix in ("", "k", "M", "G"):
    if abs(number) < 999.5:
      return f"{number:.3g}{suffix}"
    number /= 1000
  return f"{number:.3g}T"


def _clock(seconds: float) -> str:
  """Formats 41 s as 0:41, and an hour and a half as 1:30:00."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
