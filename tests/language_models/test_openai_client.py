import asyncio
import contextlib
import itertools

import pytest

from selfimprove_jax.language_models.openai_client import Limits, Throttle


class Time:
  """A clock that only sleeping moves."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now

  async def sleep(self, seconds):
    self.now += seconds
    await asyncio.sleep(0)


def _starts(limits, calls, *, actual=None):
  """Seconds after the first, at which calls of (input, output) tokens are let through."""
  time = Time()
  throttle = Throttle(limits, clock=time, sleep=time.sleep)

  async def run():
    starts = []
    for call in calls:
      async with throttle.slot(*call) as took:
        starts.append(time.now - 100.0)
        if actual is not None:
          took(*actual)
    return starts

  return asyncio.run(run())


def test_requests_are_spaced_evenly():
  starts = _starts(Limits(requests_per_minute=30.0), [(1, 1)] * 5)
  assert starts == pytest.approx([0, 2, 4, 6, 8])


@pytest.mark.parametrize(
  ("limits", "seconds"),
  [
    (Limits(tokens_per_minute=6000.0), 4.0),
    (Limits(input_tokens_per_minute=6000.0), 1.0),
    (Limits(output_tokens_per_minute=6000.0), 3.0),
    (Limits(input_tokens_per_minute=600.0, output_tokens_per_minute=60000.0), 10.0),
  ],
)
def test_token_limits_space_calls_by_their_tokens(limits, seconds):
  # 100 tokens in and 300 out, of 100 a second.
  starts = _starts(limits, [(100, 300)] * 4)
  gaps = [b - a for a, b in itertools.pairwise(starts)]
  assert gaps[-1] == pytest.approx(seconds)


@pytest.mark.parametrize("per_minute", [90.0, 600.0])
def test_no_minute_exceeds_its_limit_by_more_than_a_second_of_burst(per_minute):
  starts = _starts(Limits(requests_per_minute=per_minute), [(1, 1)] * int(3 * per_minute))
  for start in starts[:: max(1, len(starts) // 50)]:
    assert sum(start <= t < start + 60 for t in starts) <= per_minute * 61 / 60 + 1
  assert starts[-1] <= 180  # and hardly less


def test_unused_tokens_are_returned_to_the_bucket():
  limits = Limits(output_tokens_per_minute=6000.0)
  assert _starts(limits, [(1, 1000)] * 3)[-1] == pytest.approx(20.0)
  assert _starts(limits, [(1, 1000)] * 3, actual=(1, 50))[-1] <= 1.0


def test_a_request_larger_than_the_bucket_is_sent_and_leaves_a_debt():
  assert _starts(Limits(tokens_per_minute=60.0), [(100, 20), (1, 1)])[-1] == pytest.approx(120.0)


def test_concurrency_halves_on_overload_and_grows_back():
  time = Time()
  throttle = Throttle(Limits(max_concurrent=16), clock=time, sleep=time.sleep)
  for _ in range(3):  # of one burst
    throttle.cool_down(5.0)
  assert throttle.allowed == 8
  time.now += 6
  throttle.cool_down(1.0)
  assert throttle.allowed == 4
  for _ in range(400):
    throttle.succeeded()
  assert throttle.allowed == 16
  for _ in range(20):
    time.now += 10
    throttle.cool_down(1.0)
  assert throttle.allowed == 1


def test_nothing_is_sent_during_a_cool_down():
  time = Time()
  throttle = Throttle(Limits(), clock=time, sleep=time.sleep)

  async def run():
    throttle.cool_down(3.0)
    throttle.cool_down(1.0)
    async with throttle.slot(1, 1):
      return time.now

  assert asyncio.run(run()) == pytest.approx(103.0)


def test_calls_in_flight_are_bounded_and_served_in_order():
  async def run():
    throttle = Throttle(Limits(max_concurrent=3))
    order, running, most = [], 0, 0

    async def call(n):
      nonlocal running, most
      async with throttle.slot(1, 1):
        order.append(n)
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1

    await asyncio.gather(*(call(n) for n in range(20)))
    return order, most

  order, most = asyncio.run(run())
  assert order == list(range(20)) and most == 3


def test_a_cancelled_or_failed_call_frees_its_slot():
  async def run():
    throttle = Throttle(Limits(max_concurrent=1))

    async def call():
      async with throttle.slot(1, 1):
        await asyncio.sleep(10)

    running, waiting = asyncio.create_task(call()), asyncio.create_task(call())
    await asyncio.sleep(0.01)
    waiting.cancel()
    running.cancel()
    with contextlib.suppress(ZeroDivisionError):
      async with throttle.slot(1, 1):
        raise ZeroDivisionError
    async with asyncio.timeout(1), throttle.slot(1, 1):
      return True

  assert asyncio.run(run())


@pytest.mark.parametrize("options", [{"max_concurrent": 0}, {"tokens_per_minute": -1.0}])
def test_a_limit_of_zero_is_refused(options):
  with pytest.raises(ValueError, match="must be more than 0"):
    Limits(**options)
