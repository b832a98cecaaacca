"""Every variant of every config builds its stages, without allocating a parameter."""

import importlib
import pathlib

import pytest

from selfimprove_jax.pipelines import plan, runner

_VARIANTS = {
  "sbp_quick": ("quick", "smoke"),
  "cpt_quick": ("quick", "smoke"),
  "entigraph_8b": ("paper",),
  "sbp_3b": ("200b", "1t"),
  "sbp_6b": ("200b", "1t"),
  "budget_forcing": ("default", "s1", "quick", "smoke"),
}
_LAST = {
  "sbp": "arms/sbp",
  "continued_pretraining": "tuned",
  "budget_forcing": "responses/parallel",
}
_CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"


def test_every_config_file_is_tested_here():
  files = {path.stem for path in _CONFIGS.glob("*.py")} - {"__init__", "parts", "paper_scale"}
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
  described = plan.describe(stages, None, device="v5p", num_devices=256)
  assert _LAST[config["pipeline"]] in described


@pytest.mark.parametrize("name", [name for name in _VARIANTS if name.startswith("sbp")])
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


def test_entigraph_is_the_continued_pretraining_of_the_paper():
  stages = runner.build(importlib.import_module("configs.entigraph_8b").get_config().to_dict())
  (tuned,) = [stage for stage in stages if stage.name == "tuned"]
  assert tuned.plan.tokens == 910_000_000  # two epochs of 455M
  assert tuned.plan.state_bytes == 16 * 8_030_261_248  # Llama-3-8B's parameters
  settings = tuned.config["training"] | {"replay": tuned.config["replay_share"]}
  expected = dict(batch_rows=16, seq_len=2048, peak_lr=5e-6, final_lr=0.0, warmup_fraction=0.05)
  expected |= dict(b1=0.9, b2=0.999, eps=1e-8, clip_norm=1.0, replay=0.1)
  assert settings | expected == settings
  assert tuned.config["weight_decay"] == 0.01


@pytest.mark.parametrize(
  ("name", "variant", "synthetic", "unique", "num_steps", "parameters"),
  [
    ("sbp_3b", "200b", 75e9, 10e9, 23_841, 2.74e9),
    ("sbp_3b", "1t", 125e9, 50e9, 119_209, 2.74e9),
    ("sbp_6b", "1t", 250e9, 50e9, 119_209, 5.87e9),
  ],
)
def test_sbp_at_scale_has_the_tokens_of_the_paper(
  name, variant, synthetic, unique, num_steps, parameters
):
  config = importlib.import_module(f"configs.{name}").get_config(variant).to_dict()
  stages = {stage.name: stage for stage in runner.build(config)}
  arm = stages["arms/sbp"]
  assert arm.config["mixture"]["sbp"] * config["total_tokens"] == pytest.approx(synthetic)
  assert stages["tokens"].config["unique_tokens"] == unique
  assert config["total_tokens"] / unique == 20  # passes of the baseline
  assert arm.config["num_steps"] == num_steps  # of 2048 x 4096 tokens
  assert arm.plan.state_bytes == pytest.approx(16 * parameters, rel=0.01)
  assert stages["samples/sbp"].plan.tokens >= synthetic
