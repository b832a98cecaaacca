"""Eight CPU devices for every test, and the folder of real data where there is one."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
  """The folder that SELFIMPROVE_DATA names (corpora, evals, models)."""
  folder = os.environ.get("SELFIMPROVE_DATA")
  if not folder or not pathlib.Path(folder).is_dir():
    pytest.skip("SELFIMPROVE_DATA names no folder of real corpora")
  return pathlib.Path(folder)
