"""The table of `--dry_run`."""

import pytest

from selfimprove_jax.runs import plan
from selfimprove_jax.runs.stage import Plan, Stage, run_stage
from selfimprove_jax.runtime.config import section
from selfimprove_jax.runtime.partitioning import MeshConfig
from selfimprove_jax.runtime.progress import Progress


@section
class ToyConfig:
  """Config of the toy stages."""

  mesh: MeshConfig = MeshConfig(data=1, fsdp=-1)


def _make(context, config):
  return {}


_PLAN = Plan(tokens=1_000_000, flops=0.4 * 989e12 * 90, state_bytes=2.0**33)
_READS = {"tokens": "documents", "again": "documents"}
_STAGES = [
  Stage("documents", _make, ToyConfig()),
  Stage("seed", _make, ToyConfig(), _READS, _PLAN),
]


def _rows(text):
  return {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}


def test_every_stage_has_a_row_with_its_inputs_tokens_flops_and_state():
  rows = _rows(plan.describe(_STAGES, None, device=None, num_devices=1))
  assert rows["documents"] == ["documents"]
  assert rows["seed"] == ["seed", "documents", "1,000,000", "3.56e+16", "8", "GiB"]
  assert rows["total"] == ["total", "3.56e+16"]


def test_a_bound_is_at_most_and_so_is_the_total():
  bound = Stage("sampled", _make, ToyConfig(), {}, Plan(tokens=5, flops=2e9, is_bound=True))
  text = plan.describe([*_STAGES, bound], None, device=None, num_devices=1)
  assert "at most 5  at most 2.00e+09" in text
  assert "total, at most" in text
  unknown = Stage("later", _make, ToyConfig(), uses_devices=True)
  text = plan.describe([bound, unknown], None, device=None, num_devices=1)
  assert "total of what is known" in text


@pytest.mark.parametrize(
  ("num_devices", "time", "state"), [(1, ["1.5", "min"], "8"), (2, ["45", "s"], "4")]
)
def test_time_and_state_are_divided_by_the_devices(num_devices, time, state):
  text = plan.describe(_STAGES, None, device="h100", num_devices=num_devices)
  assert _rows(text)["seed"][-4:] == [state, "GiB", *time]
  assert f"{num_devices} x h100 at 40% of its bf16 peak" in text


def test_data_parallel_devices_each_hold_the_whole_state():
  config = ToyConfig(mesh=MeshConfig(data=4, fsdp=2))
  stage = Stage("seed", _make, config, {}, _PLAN)
  rows = _rows(plan.describe([stage], None, device=None, num_devices=8))
  assert rows["seed"][-2:] == ["4", "GiB"]


def test_complete_stages_are_marked(tmp_path):
  run_stage(_STAGES[0], tmp_path, Progress(quiet=True))
  rows = _rows(plan.describe(_STAGES, tmp_path, device=None, num_devices=1))
  assert rows["documents"][-1] == "yes"
  assert rows["seed"][-1] != "yes"


def test_an_unknown_device_is_refused_with_the_nearest_and_all():
  with pytest.raises(ValueError, match=r"--device=h10 is unknown; did you mean 'h100'\?.*'v5p'"):
    plan.describe(_STAGES, None, device="h10", num_devices=1)
