import logging

import jax
import jax.numpy as jnp
import pytest

from selfimprove_jax.runtime import xla_options


@pytest.fixture(autouse=True)
def asked_anew():
  xla_options.for_platform.cache_clear()
  yield
  xla_options.for_platform.cache_clear()


def test_an_unknown_option_is_left_out_with_a_line_and_the_others_are_used(monkeypatch, caplog):
  options = {"xla_gpu_graph_level": 1, "xla_cpu_enable_fast_math": False}
  monkeypatch.setitem(xla_options.OPTIONS, "cpu", options)
  monkeypatch.setattr(xla_options, "_has_avx512", lambda: False)
  with caplog.at_level(logging.WARNING):
    known = xla_options.for_platform("cpu")
  assert known == {"xla_cpu_enable_fast_math": False}
  assert "xla_gpu_graph_level is dropped" in caplog.text
  assert jax.jit(lambda x: x + 1, compiler_options=known)(jnp.int32(1)) == 2


@pytest.mark.parametrize("option", xla_options.OPTIONS["gpu"])
def test_this_version_of_xla_knows_every_option_for_gpus(option):
  # Options of GPUs are parsed on every machine; that they still do something is not shown.
  if "pipelined" in option and jax.__version_info__ >= (0, 11):
    pytest.skip("newer versions do not have this option, and `for_platform` drops it")
  xla_options._probe(option, xla_options.OPTIONS["gpu"][option])


@pytest.mark.parametrize("has_avx512", [True, False])
def test_a_processor_with_avx512_gets_options_of_its_own(monkeypatch, has_avx512):
  monkeypatch.setattr(xla_options, "_has_avx512", lambda: has_avx512)
  expected = xla_options.OPTIONS["cpu_avx512"] if has_avx512 else {}
  assert xla_options.for_platform("cpu") == expected


def test_a_machine_that_is_not_this_one_gets_no_options():
  assert xla_options.for_platform("tpu") == {}
