import types

import jax
import pytest

from selfimprove_jax.runtime import hardware


@pytest.mark.parametrize(
  ("told", "name"),
  [
    ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v5p", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA GeForce RTX 4090", None),
  ],
)
def test_a_device_is_known_by_what_it_calls_itself(told, name):
  device = types.SimpleNamespace(device_kind=told, platform="gpu")
  assert hardware.kind(device) == name
  found = hardware.peak([device] * 4, "bfloat16")
  assert found == (name and (4 * hardware.PEAK_FLOPS[name], f"bf16 peak of 4 {name}"))
  assert hardware.peak([device], "float32") is None


def test_the_peak_of_a_cpu_is_measured_and_says_so():
  flops, name = hardware.peak(jax.devices(), "float32")
  assert flops > 1e8
  assert "measured" in name
