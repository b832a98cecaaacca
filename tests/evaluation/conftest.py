"""Tiny models whose tokenizers do, and do not, begin a text with BOS."""

import pytest

from selfimprove_jax.language_models import local
from tests.evaluation import tiny_model


@pytest.fixture(scope="session", params=[True, False], ids=["bos", "no_bos"])
def model(request, tmp_path_factory, one_device_mesh):
  """A local model of 128 positions; `model.prefix_ids` says whether it has a BOS."""
  folder = tiny_model.save(
    tmp_path_factory.mktemp("model"), adds_bos=request.param, max_positions=128
  )
  model = local.load(folder, one_device_mesh, num_slots=4)
  yield model
  model.close()
