import pytest

from selfimprove_jax.training import speed


class _Time:
  """A fake clock that the test sets."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


@pytest.fixture
def time(monkeypatch):
  fake = _Time()
  monkeypatch.setattr(speed.time, "perf_counter", fake)
  return fake


def _run(time, peak):
  """Runs 1 s of compilation, steps of 1, 1, 2 and 1 s, and 3 s of evaluation in between."""
  clock = speed.Clock(step_tokens=50, flops_per_token=6.0, peak=peak)
  with clock.lost_to("compile"):
    time.now += 1
  for index, seconds in enumerate((1, 1, 2, 1)):
    with clock.lost_to("data"):
      time.now += 0.25
    time.now += seconds
    clock.step_done()
    if index == 1:
      with clock.lost_to("evaluation"):
        time.now += 3
  return clock


def test_steps_are_timed_without_lost_time_and_shares_are_of_all_time(time):
  found = _run(time, (1000.0, "an abacus")).summary()
  assert found["tokens_per_second"] == 4 * 50 / 5
  assert found["mfu"] == pytest.approx(40 * 6 / 1000)
  assert found["step_seconds"][1] == 1.0
  assert found["goodput"] == pytest.approx(5 / 10)
  assert found["lost"] == pytest.approx(
    {"compile": 0.1, "data": 0.1, "evaluation": 0.3, "checkpoint": 0.0}
  )


def test_the_summary_can_be_of_the_last_steps_only(time):
  assert _run(time, None).summary(last_steps=2)["tokens_per_second"] == 2 * 50 / 3


def test_without_a_peak_there_is_no_mfu_and_without_steps_no_line(time):
  clock = _run(time, None)
  assert clock.summary()["mfu"] is None
  assert "MFU" not in clock.line()
  assert speed.Clock(step_tokens=1, flops_per_token=1.0, peak=None).line() == ""


def test_a_peak_below_the_speed_of_the_run_gives_no_mfu(time):
  clock = _run(time, (200.0, "an abacus"))  # the run makes 240 FLOP/s
  assert clock.summary()["mfu"] is None
  assert "MFU unknown, above 100% of 2e-10 TFLOP/s (an abacus" in clock.line()


def test_the_line_names_the_peak_and_the_convention(time):
  line = _run(time, (1e12, "an abacus")).line()
  assert "40 tokens/s" in line
  assert "of 1 TFLOP/s (an abacus; causal attention counted half)" in line
  assert "goodput 50.0%" in line
