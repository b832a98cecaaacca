"""The table of `--dry_run`."""

import pytest

from selfimprove_jax.pipelines import plan, stages
from selfimprove_jax.pipelines.stages import Plan, Stage
from selfimprove_jax.progress import Progress

_STAGES = [
  Stage("documents", "text_stages:documents", {}),
  Stage(
    "seed",
    "model_stages:pretrain",
    {},
    {"tokens": "documents", "again": "documents"},
    Plan(tokens=1_000_000, flops=0.4 * 989e12 * 90, state_bytes=2.0**33),
  ),
]


def _rows(text):
  return {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}


def test_every_stage_has_a_row_with_its_inputs_tokens_flops_and_state():
  rows = _rows(plan.describe(_STAGES, None, device=None, num_devices=1))
  assert rows["documents"] == ["documents"]
  assert rows["seed"] == ["seed", "documents", "1,000,000", "3.56e+16", "8", "GiB"]
  assert rows["total"] == ["total", "3.56e+16"]


@pytest.mark.parametrize(
  ("num_devices", "time", "state"), [(1, ["1.5", "min"], "8"), (2, ["45", "s"], "4")]
)
def test_time_and_state_are_divided_by_the_devices(num_devices, time, state):
  text = plan.describe(_STAGES, None, device="h100", num_devices=num_devices)
  assert _rows(text)["seed"][-4:] == [state, "GiB", *time]
  assert f"{num_devices} x h100 at 40% of its bf16 peak" in text


def test_complete_stages_are_marked(tmp_path, monkeypatch):
  monkeypatch.setattr(Stage, "load", lambda stage: lambda context: {})
  stages.run_stage(_STAGES[0], tmp_path, Progress(quiet=True))
  rows = _rows(plan.describe(_STAGES, tmp_path, device=None, num_devices=1))
  assert rows["documents"][-1] == "yes"
  assert rows["seed"][-1] != "yes"


def test_an_unknown_device_is_refused_with_those_there_are():
  with pytest.raises(ValueError, match=r"'h9000' is unknown; there are .*'h100'"):
    plan.describe(_STAGES, None, device="h9000", num_devices=1)
