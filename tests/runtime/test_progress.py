import io
import time

import pytest

from selfimprove_jax.runtime import progress


class _Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  """A clock that the test moves."""
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  return now


def test_a_log_gets_one_line_every_few_seconds_and_one_at_the_end(clock):
  stream = io.StringIO()
  with progress.Progress(every_seconds=5.0, stream=stream).track(1500, "seed", "steps") as bar:
    for _ in range(12):
      clock[0] += 1
      bar.update(100, loss=4.2134, tokens_per_second=18_300)
  assert stream.getvalue().splitlines() == [
    "seed  500/1,500 steps  33%  18.3k tokens/s  loss 4.21  0:10 left",
    "seed  1,000/1,500 steps  66%  18.3k tokens/s  loss 4.21  0:05 left",
    "seed  1,200/1,500 steps  80%  18.3k tokens/s  loss 4.21  in 0:12",
  ]


def test_work_done_by_an_earlier_run_counts_as_done_but_not_toward_the_rate(clock):
  stream = io.StringIO()
  tracker = progress.Progress(every_seconds=0.0, stream=stream)
  with tracker.track(1000, "seed", "steps", start=900) as bar:
    clock[0] += 10
    bar.update(10)
  assert stream.getvalue().startswith("seed  910/1,000 steps  91%  1 steps/s  1:30 left\n")


def test_an_unknown_total_shows_no_time_left(clock):
  stream = io.StringIO()
  tracker = progress.Progress(every_seconds=0.0, stream=stream)
  with tracker.track(None, "corpus", "documents") as bar:
    clock[0] += 2
    bar.update(5000)
  assert stream.getvalue().splitlines()[0] == "corpus  5,000 documents  2.5k documents/s"


def test_quiet_says_nothing():
  stream = _Terminal()
  with progress.Progress(quiet=True, every_seconds=0.0, stream=stream).track(
    2, "a", "steps"
  ) as bar:
    bar.update(2)
  assert stream.getvalue() == ""


def test_failed_work_is_not_announced_as_finished():
  stream = io.StringIO()
  with (
    pytest.raises(RuntimeError),
    progress.Progress(every_seconds=1e9, stream=stream).track(2, "a", "steps") as bar,
  ):
    bar.update(1)
    raise RuntimeError
  assert stream.getvalue() == ""


def test_a_terminal_gets_a_live_bar_that_may_hold_another_and_ends_in_a_plain_line(monkeypatch):
  monkeypatch.setattr(progress, "_LIVE_SECONDS", 0.0)
  stream = _Terminal()
  tracker = progress.Progress(stream=stream)
  for _ in range(2):  # the display can be opened again
    with tracker.track(3, "outer", "arms") as outer:
      with tracker.track(2, "inner [b]", "steps") as inner:
        inner.update(1)
        inner.update(1)
      outer.update(3)
  text = stream.getvalue()
  assert "inner [b]  1/2 steps  50%" in text  # a label is no markup
  assert text.rstrip().splitlines()[-1].startswith("outer  3/3 arms  100%")


@pytest.mark.parametrize(("total", "start"), [(-1, 0), (5, 6), (5, -1)])
def test_counts_that_cannot_be_are_refused(total, start):
  with (
    pytest.raises(ValueError, match="'seed'"),
    progress.Progress(quiet=True).track(total, "seed", "steps", start=start),
  ):
    pass


def test_an_update_is_cheap():
  with progress.Progress(every_seconds=1e9, stream=io.StringIO()).track(
    None, "a", "documents"
  ) as bar:
    began = time.perf_counter()
    for _ in range(20_000):
      bar.update(1, loss=4.2)
    seconds = time.perf_counter() - began
  assert seconds < 1.0  # 50 microseconds each; 0.25 are measured
