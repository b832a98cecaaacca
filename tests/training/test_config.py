import itertools

import numpy as np
import pytest

from selfimprove_jax.runtime.config import page, parse
from selfimprove_jax.training.config import TrainingConfig

VALUES = page(TrainingConfig, batch_rows=8, peak_lr=1.0, final_lr=0.1).to_dict()


def _config(**changes):
  return parse(TrainingConfig, VALUES | changes, path="training")


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine_to_the_last_step():
  rate = _config(warmup_fraction=1 / 3).learning_rate(12)
  rates = [float(rate(step)) for step in range(13)]
  np.testing.assert_allclose(rates[:5], [0, 0.25, 0.5, 0.75, 1.0], rtol=1e-6)
  np.testing.assert_allclose(rates[8], 0.55, rtol=1e-6)
  np.testing.assert_allclose(rates[12], 0.1, rtol=1e-6)
  assert all(a > b for a, b in itertools.pairwise(rates[4:]))


@pytest.mark.parametrize(("warmup_fraction", "num_steps"), [(0.0, 10), (0.9, 1)])
def test_without_warm_up_the_first_step_has_the_peak_rate(warmup_fraction, num_steps):
  rate = _config(warmup_fraction=warmup_fraction, final_lr=0.0).learning_rate(num_steps)
  assert float(rate(0)) == 1.0
  assert float(rate(num_steps)) == pytest.approx(0.0, abs=1e-7)


def test_evaluations_and_checkpoints_are_spaced_evenly_with_the_last_at_the_end():
  config = _config(num_evaluations=4, num_checkpoints=3)
  assert (config.evaluate_every(100), config.checkpoint_every(100)) == (25, 34)
  assert (config.evaluate_every(2), config.checkpoint_every(2)) == (1, 1)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"optimizer": "sgd"}, r"training\.optimizer='sgd'.*'adamw' or 'muon'"),
    ({"batch_rows": 0}, r"training\.batch_rows=0"),
    ({"warmup_fraction": 1.0}, r"training\.warmup_fraction=1\.0"),
    ({"peak_lr": 0.0}, r"training\.peak_lr=0\.0"),
    ({"keep": 0}, r"training\.keep=0"),
    ({"patience": 0}, r"training\.patience=0"),
    ({"momentum_dtype": "int8"}, r"training\.momentum_dtype='int8'"),
    ({"accumulation_steps": 3}, r"batch_rows=8 must be a multiple of accumulation_steps=3"),
    ({"skip_spikes": {"window": 1, "num_deviations": 6.0}}, r"skip_spikes: window=1"),
    ({"z_loss": 1e9}, r"training\.z_loss.*: there is no such knob"),
  ],
)
def test_a_value_out_of_range_is_refused_by_path(changes, message):
  with pytest.raises(ValueError, match=message):
    _config(**changes)
