import collections
import hashlib
import itertools
import threading
import time

import grain
import numpy as np
import pytest

from selfimprove_jax.data import mixture, packing, rows


@pytest.fixture
def make_source(tmp_path):
  def make(name, num_rows, seq_len=4, first_token=0):
    """Row i holds the token `first_token + i` only."""
    examples = (
      packing.Example(np.full(seq_len, first_token + i, np.int32), np.arange(seq_len) > 0)
      for i in range(num_rows)
    )
    packed = packing.pack(examples, seq_len=seq_len, pad_id=0)
    counts = rows.write_rows(tmp_path / name, packed)
    return rows.RowSource([tmp_path / name], counts=[counts], seq_len=seq_len)

  return make


def _component(name, source, weight=1.0, repeat=True):
  return mixture.Component(name, source, weight, repeat)


def _tokens(batch):
  return batch["tokens"][:, 0].tolist()


def test_each_pass_sees_each_row_once_in_another_order(make_source):
  data = mixture.Mixture(
    [_component("a", make_source("a", 30))], batch_size=6, num_steps=15, seed=0
  )
  seen = [token for step in range(15) for token in _tokens(data.batch(step))]
  passes = [seen[i : i + 30] for i in (0, 30, 60)]
  assert all(sorted(one) == list(range(30)) for one in passes)
  assert passes[0] != passes[1] != passes[2] != passes[0] != list(range(30))


def test_without_repeat_no_row_is_seen_twice(make_source):
  components = [
    _component("real", make_source("real", 20)),
    _component("synthetic", make_source("synthetic", 40, first_token=100), 2.0, repeat=False),
  ]
  data = mixture.Mixture(components, batch_size=6, num_steps=10, seed=0)
  seen = collections.Counter(t for step in range(10) for t in _tokens(data.batch(step)))
  assert [seen[100 + i] for i in range(40)] == [1] * 40
  assert [seen[i] for i in range(20)] == [1] * 20
  assert data.rows_used(10) == {"real": 20, "synthetic": 40}


def test_a_component_too_small_for_its_share_is_refused_before_training(make_source):
  components = [
    _component("real", make_source("real", 20)),
    _component("synthetic", make_source("synthetic", 39), 2.0, repeat=False),
  ]
  with pytest.raises(ValueError, match=r"'synthetic' is smaller .* need 40 .* it has 39.*repeat"):
    mixture.Mixture(components, batch_size=6, num_steps=10, seed=0)


@pytest.mark.parametrize(
  "weights", [(1.0, 1.0), (0.7, 0.2, 0.1), (1.0, 1000.0), (0.1, 0.2, 0.3, 0.4)]
)
def test_shares_follow_the_weights_all_along(make_source, weights):
  components = [
    _component(str(i), make_source(str(i), 10, first_token=100 * i), weight)
    for i, weight in enumerate(weights)
  ]
  data = mixture.Mixture(components, batch_size=20, num_steps=12, seed=0)
  seen = collections.Counter()
  for step in range(12):
    seen.update(str(token // 100) for token in _tokens(data.batch(step)))
    assert {name: seen[name] for name in data.rows_used(1)} == data.rows_used(step + 1)
    for i, weight in enumerate(weights):
      assert abs(seen[str(i)] - (step + 1) * 20 * weight / sum(weights)) < len(weights)
  assert data.passes(12) == {name: count / 10 for name, count in seen.items()} | {
    name: 0.0 for name in data.rows_used(1) if not seen[name]
  }


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_processes(make_source, process_count):
  components = [
    _component("a", make_source("a", 7)),
    _component("b", make_source("b", 50, first_token=100), 3.0, repeat=False),
  ]

  def make(index, count):
    return mixture.Mixture(
      components, batch_size=8, num_steps=8, seed=1, process_index=index, process_count=count
    )

  processes = [make(index, process_count) for index in range(process_count)]
  for step in range(8):
    alone = make(0, 1).batch(step)
    parts = [process.batch(step) for process in processes]
    for name, array in alone.items():
      np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_a_batch_is_a_function_of_the_step_alone(make_source):
  components = [_component("a", make_source("a", 30))]
  data = mixture.Mixture(components, batch_size=4, num_steps=20, seed=0)
  forwards = [_tokens(data.batch(step)) for step in range(20)]
  longer = mixture.Mixture(components, batch_size=4, num_steps=40, seed=0)
  assert [_tokens(longer.batch(step)) for step in reversed(range(20))] == forwards[::-1]
  assert [_tokens(batch) for _, batch in data.iterate(5, num_steps=9)] == forwards[5:14]
  other = mixture.Mixture(components, batch_size=4, num_steps=20, seed=1)
  assert [_tokens(other.batch(step)) for step in range(20)] != forwards


def test_many_rows_are_in_the_order_of_grains_shuffle(make_source):
  read = []

  class Long(rows.RowSource):
    def __len__(self):
      return 1 << 16

    def record(self, index):
      read.append(index)
      return super().record(0)

  source = make_source("a", 1)
  source.__class__ = Long
  data = mixture.Mixture([_component("a", source)], batch_size=1024, num_steps=256, seed=3)
  seed = int.from_bytes(hashlib.blake2b(b"3\0a", digest_size=4).digest())
  order = grain.MapDataset.source(range(1 << 16)).shuffle(seed=seed).repeat(4)
  for step in (0, 63, 64, 255):
    data.batch(step)
    assert read == [order[step * 1024 + i] for i in range(1024)]
    read.clear()


def test_every_order_of_few_rows_is_as_likely_as_any_other(make_source):
  data = mixture.Mixture(
    [_component("a", make_source("a", 3))], batch_size=300, num_steps=20, seed=0
  )
  seen = np.concatenate([data.batch(step)["tokens"][:, 0] for step in range(20)])
  counts = collections.Counter(map(tuple, seen.reshape(2000, 3).tolist()))
  assert sorted(counts) == sorted(itertools.permutations(range(3)))
  chi_square = sum((count - 2000 / 6) ** 2 / (2000 / 6) for count in counts.values())
  assert chi_square < 20.5  # of 5 degrees of freedom: once in a thousand


def test_the_order_of_few_rows_stays_as_it_was(make_source):
  """A run goes on with the same data in another release of ours or of numpy."""
  data = mixture.Mixture(
    [_component("a", make_source("a", 10))], batch_size=10, num_steps=2, seed=0
  )
  assert [_tokens(data.batch(step)) for step in range(2)] == [
    [5, 4, 9, 2, 7, 3, 8, 0, 6, 1],
    [8, 3, 9, 7, 5, 0, 4, 6, 2, 1],
  ]


def test_the_last_step_of_a_very_long_run_is_like_any_other(make_source):
  components = [
    _component("a", make_source("a", 7), 0.9),
    _component("b", make_source("b", 90, first_token=100), 0.1),
  ]
  num_steps = 10**9  # of 10 rows; numbers beyond 32 bits
  data = mixture.Mixture(components, batch_size=10, num_steps=num_steps, seed=0)
  parts = [
    mixture.Mixture(
      components, batch_size=10, num_steps=num_steps, seed=0, process_index=i, process_count=2
    )
    for i in range(2)
  ]
  last = _tokens(data.batch(num_steps - 1))
  assert sorted(token // 100 for token in last) == [0] * 9 + [1]
  assert [t for part in parts for t in _tokens(part.batch(num_steps - 1))] == last
  assert data.rows_used(num_steps) == {"a": 9 * 10**9, "b": 10**9}


def test_neighbouring_seeds_and_components_of_one_size_have_unlike_orders(make_source):
  source = make_source("a", 200)
  names = [("a", 0), ("b", 0), ("a", 1)]
  orders = []
  for name, seed in names:
    data = mixture.Mixture([_component(name, source)], batch_size=200, num_steps=3, seed=seed)
    orders += [tuple(_tokens(data.batch(step))) for step in range(3)]
  assert len(set(orders)) == 9


def test_batches_hold_all_that_training_needs(make_source):
  data = mixture.Mixture([_component("a", make_source("a", 9))], batch_size=4, num_steps=2, seed=0)
  ((step, batch),) = data.iterate(1, num_steps=1)
  assert step == 1
  assert {name: (array.shape, str(array.dtype)) for name, array in batch.items()} == {
    "tokens": ((4, 4), "int32"),
    "positions": ((4, 4), "int32"),
    "segment_ids": ((4, 4), "int32"),
    "loss_mask": ((4, 4), "bool"),
  }


def test_prefetching_stops_with_its_consumer(make_source):
  data = mixture.Mixture([_component("a", make_source("a", 9))], batch_size=4, num_steps=99, seed=0)
  before = threading.active_count()
  batches = data.iterate(0, num_steps=99)
  next(batches)
  assert threading.active_count() == before + 1
  batches.close()
  assert threading.active_count() == before


def test_batches_that_nobody_waits_for_are_not_made(make_source):
  made = []

  class Slow(rows.RowSource):
    def record(self, index):
      made.append(index)
      time.sleep(0.01)
      return super().record(index)

  source = make_source("a", 9)
  source.__class__ = Slow
  data = mixture.Mixture([_component("a", source)], batch_size=1, num_steps=99, seed=0)
  batches = data.iterate(0, num_steps=99, prefetch=50)
  next(batches)
  batches.close()
  assert len(made) < 10


def test_an_error_in_the_thread_reaches_the_consumer_when_its_step_is_due(make_source):
  class Breaking(rows.RowSource):
    def record(self, index):
      if index == 5:
        raise OSError("the disk is gone")
      return super().record(index)

  source = make_source("a", 12)
  source.__class__ = Breaking
  data = mixture.Mixture([_component("a", source)], batch_size=1, num_steps=12, seed=0)
  steps = []
  with pytest.raises(OSError, match="the disk is gone"):
    for step, _ in data.iterate(0, num_steps=12, prefetch=3):
      steps.append(step)
  order = mixture.Mixture(
    [_component("a", make_source("b", 12))], batch_size=1, num_steps=12, seed=0
  )
  tokens = [_tokens(order.batch(step))[0] for step in range(12)]
  assert steps == list(range(tokens.index(5)))


def test_wrong_mixtures_are_refused(make_source):
  a = _component("a", make_source("a", 9))
  options = dict(batch_size=4, num_steps=2, seed=0)
  with pytest.raises(ValueError, match="each with its own name"):
    mixture.Mixture([a, a], **options)
  with pytest.raises(ValueError, match="give at least one"):
    mixture.Mixture([], **options)
  with pytest.raises(ValueError, match="weight 0"):
    mixture.Mixture([a, _component("b", a.source, 0.0)], **options)
  with pytest.raises(ValueError, match="different lengths"):
    mixture.Mixture([a, _component("b", make_source("b", 9, seq_len=8))], **options)
  with pytest.raises(ValueError, match="has no rows"):
    mixture.Mixture([_component("b", make_source("c", 0))], **options)
  with pytest.raises(ValueError, match="divide over 3 processes"):
    mixture.Mixture([a], process_count=3, **options)
  with pytest.raises(IndexError, match="step 2 of a mixture of 2"):
    mixture.Mixture([a], **options).batch(2)
  with pytest.raises(IndexError, match="step 2"):
    list(mixture.Mixture([a], **options).iterate(0, num_steps=3))
