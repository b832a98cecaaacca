"""Every variant of every config builds its stages, without allocating a parameter."""

import importlib
import pathlib

import pytest

from selfimprove_jax.pipelines import plan, runner

_VARIANTS = {"sbp_quick": ("quick", "smoke")}
_CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"


def test_every_config_file_is_tested_here():
  files = {path.stem for path in _CONFIGS.glob("*.py")} - {"__init__", "parts"}
  assert files == _VARIANTS.keys()


@pytest.mark.parametrize(
  ("name", "variant"), [(name, v) for name, variants in _VARIANTS.items() for v in variants]
)
def test_every_variant_passes_the_check_and_can_be_planned(name, variant):
  config = importlib.import_module(f"configs.{name}").get_config(variant).to_dict()
  runner.check(config)
  stages = runner.build(config)
  made = set()
  for stage in stages:
    assert set(stage.inputs.values()) <= made, f"{stage.name} reads what is made after it"
    made.add(stage.name)
    stage.load()
  assert "arms/sbp" in plan.describe(stages, None, device="v5p", num_devices=256)


@pytest.mark.parametrize("name", _VARIANTS)
def test_the_arms_to_compare_have_the_same_seed_schedule_and_steps(name):
  for variant in _VARIANTS[name]:
    config = importlib.import_module(f"configs.{name}").get_config(variant).to_dict()
    arms = {
      stage.name: stage.config
      for stage in runner.build(config)
      if stage.name.startswith("arms/") and "num_steps" in stage.config
    }
    assert {"arms/baseline", "arms/sbp", "arms/oracle"} <= arms.keys()
    for part in ("num_steps", "training", "seed", "mesh", "evaluation"):
      assert all(arm[part] == arms["arms/baseline"][part] for arm in arms.values()), part
