"""Every variant of every page builds its stages; every knob can be set, wrong ones are refused."""

import importlib
import json
import pathlib
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal

import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags
from pydantic import Field

from selfimprove_jax.data.corpora import JsonlConfig
from selfimprove_jax.data.tokenizer import SpecialTokens
from selfimprove_jax.pipelines import registry
from selfimprove_jax.runs import plan
from selfimprove_jax.runtime.config import page, parse, section, to_json

_VARIANTS = {
  "sbp_quick": ("quick", "smoke"),
  "cpt_quick": ("quick", "smoke"),
  "entigraph_quality": ("paper", "rivals", "scaling"),
  "entigraph_quick": ("quick", "smoke", "niche", "replay"),
  "sbp_3b": ("200b", "1t"),
  "sbp_6b": ("200b", "1t"),
  "budget_forcing": ("default", "s1", "quick", "smoke"),
  "evaluation": ("sbp", "closed_book", "math"),
  "sft": ("chat", "s1", "smoke"),
}
_LAST = {
  "sbp": "arms/sbp",
  "continued_pretraining": "tuned",
  "entigraph": "losses/initial",
  "budget_forcing": "responses/parallel",
  "evaluation": "metrics/",
  "instruction_tuning": "tuned",
}
_CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"


def _page(name: str, *variant: str) -> ml_collections.ConfigDict:
  return importlib.import_module(f"configs.{name}").get_config(*variant)


def _parse(values: dict[str, Any], overrides: Collection[str] = ()) -> Any:
  return parse(registry.load(values["pipeline"]).Config, values, overrides=overrides)


def _stages(config: Any) -> list:
  return registry.load(config.pipeline).stages(config)


def test_every_page_is_tested_here():
  files = {path.stem for path in _CONFIGS.glob("*.py")} - {"__init__", "parts", "paper_scale"}
  assert files == _VARIANTS.keys()


@pytest.mark.parametrize(
  ("name", "variant"), [(name, v) for name, variants in _VARIANTS.items() for v in variants]
)
def test_every_variant_is_valid_and_can_be_planned(name, variant):
  config = _parse(_page(name, variant).to_dict())
  stages = _stages(config)
  made = set()
  for stage in stages:
    assert set(stage.inputs.values()) <= made, f"{stage.name} reads what is made after it"
    made.add(stage.name)
    assert json.loads(json.dumps(to_json(stage.config))) == to_json(stage.config)
  described = plan.describe(stages, None, device="v5p", num_devices=256)
  assert _LAST[config.pipeline] in described


@pytest.mark.parametrize("name", sorted(_VARIANTS))
def test_an_unknown_variant_is_answered_with_the_list_and_the_nearest(name):
  known = _VARIANTS[name]
  with pytest.raises(ValueError, match=rf"'{known[0]}x' is unknown.*'{known[0]}'") as error:
    _page(name, known[0] + "x")
  assert all(variant in str(error.value) for variant in known)


def _leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
  for key, value in values.items():
    where = f"{path}.{key}" if path else key
    if isinstance(value, dict):
      yield from _leaves(value, where)
    else:
      yield where, value


def _override(name: str, *arguments: str) -> tuple[dict[str, Any], list[str]]:
  """The page and the paths that a command line sets, read by the flags that `main` has."""
  values = flags.FlagValues()
  arguments = ["main", f"--config={_CONFIGS / name}", *arguments]
  config_flags.DEFINE_config_file(
    "config", None, "", flag_values=values, lock_config=True, sys_argv=arguments
  )
  values(arguments)
  overrides = config_flags.get_override_values(values["config"])
  return values["config"].value.to_dict(), list(overrides)


@pytest.mark.parametrize("name", ["sbp_quick", "cpt_quick", "entigraph_quality", "sbp_3b"])
def test_every_knob_can_be_set_from_the_command_line(name):
  before = _page(name).to_dict()
  told = {path: value for path, value in _leaves(before)}
  assert len(told) > 80
  arguments = [
    f"--config.{path}={value if isinstance(value, str) else repr(value)}"
    for path, value in told.items()
    if value is not None
  ]
  assert _override(f"{name}.py", *arguments)[0] == before
  unset = [path for path, value in told.items() if value is None]
  set_ = _override(f"{name}.py", *(f"--config.{path}=1" for path in unset))[0]
  assert not any(value is None for _, value in _leaves(set_))
  parsed = {path for path, _ in _leaves(to_json(_parse(before)))}
  assert parsed <= set(told)
  assert set(told) - parsed <= set(unset)  # of the members of a union that the page did not choose


@pytest.mark.parametrize(
  ("argument", "path", "value"),
  [
    ("tokenizer.path=/models/x", "tokenizer.path", "/models/x"),
    ("training.skip_spikes.window=50", "training.skip_spikes.window", 50),
    ("training.patience=3", "training.patience", 3),
    ("model.attention=xla", "model.attention", "xla"),
    ("corpus.source.packages=jax", "corpus.source.packages", ("jax",)),
    ("corpus.source.packages=('jax','numpy')", "corpus.source.packages", ("jax", "numpy")),
    ("arms.oracle.all_in_of=sbp", "arms.oracle.all_in_of", "sbp"),
    ("arms.oracle.weight_decay=1", "arms.oracle.weight_decay", 1.0),
    ("mesh.fsdp=2", "mesh.fsdp", 2),
    ("synthesis.prompt_buckets=(32,62)", "synthesis.prompt_buckets", (32, 62)),
    ("seed=7", "seed", 7),
  ],
)
def test_a_knob_that_is_set_arrives_in_the_config(argument, path, value):
  found = _parse(*_override("sbp_quick.py:smoke", f"--config.{argument}"))
  for key in path.split("."):
    found = found[key] if isinstance(found, dict) else getattr(found, key)
  assert found == value


def _override_all(name: str, **knobs: str) -> Any:
  return _parse(*_override(name, *(f"--config.{path}={value}" for path, value in knobs.items())))


def test_the_command_line_chooses_another_kind_of_corpus():
  knobs = {"corpus.source.kind": "jsonl", "corpus.source.paths": "/data/*.jsonl.gz"}
  found = _override_all("sbp_quick.py:smoke", **knobs).corpus.source
  assert found == JsonlConfig(paths=("/data/*.jsonl.gz",))
  with pytest.raises(ValueError, match=r"corpus\.source\.min_chars=4: there is no such knob"):
    _override_all("sbp_quick.py:smoke", **knobs, **{"corpus.source.min_chars": "4"})
  with pytest.raises(ValueError, match=r"corpus\.source\.paths: is missing"):
    _override_all("sbp_quick.py:smoke", **{"corpus.source.kind": "jsonl"})
  with pytest.raises(ValueError, match=r"corpus\.source\.kind='json'.*did you mean 'jsonl'"):
    _override_all("sbp_quick.py:smoke", **{"corpus.source.kind": "json"})
  with pytest.raises(ValueError, match=r"corpus\.source\.paths=.*there is no such knob"):
    _override_all("sbp_quick.py:smoke", **{"corpus.source.paths": "/data/x.jsonl"})


def test_the_command_line_chooses_another_kind_of_embeddings_and_of_initial_model():
  knobs = {"embeddings.method": "seed_model", "embeddings.batch_size": "8"}
  found = _override_all("sbp_quick.py:smoke", **knobs).embeddings
  assert to_json(found) == {"method": "seed_model", "batch_size": 8}
  knobs = {"initial.kind": "checkpoint", "initial.path": "/models/x"}
  found = _override_all("cpt_quick.py:smoke", **knobs).initial
  assert (found.path, found.special_tokens) == ("/models/x", SpecialTokens())


_WRONG = [
  ("training.optimizer", "sgd", ["training.optimizer='sgd'", "'adamw'", "'muon'"]),
  ("training.z_loss", 1e9, ["training.z_loss", "there is no such knob"]),
  ("training.peak_rl", 1e-3, ["training.peak_rl", "'peak_lr'"]),
  ("model.dtype", "fp8", ["model.dtype='fp8'", "'bfloat16'"]),
  ("model.dropout_rate", 0.1, ["model.dropout_rate=0.1", "must be 0"]),
  ("seed", -1, ["seed=-1", "greater than or equal to 0"]),
  ("seed", "one", ["seed='one'"]),
  ("evaluation.batch_rows", 0, ["evaluation.batch_rows=0", "1"]),
  ("training.batch_rows", 0, ["training.batch_rows=0", "1"]),
  ("training.warmup_fraction", float("nan"), ["training.warmup_fraction"]),
  ("mesh.fdsp", 2, ["mesh.fdsp", "'fsdp'"]),
]


def _changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
  values = json.loads(json.dumps(values))
  *sections, key = path.split(".")
  section = values
  for name in sections:
    section = section[name]
  section[key] = value
  return values


@pytest.mark.parametrize("name", ["sbp_quick", "cpt_quick"])
@pytest.mark.parametrize(("path", "value", "told"), _WRONG)
def test_a_wrong_knob_is_refused_by_path_value_and_bound(name, path, value, told):
  values = _changed(_page(name, "smoke").to_dict(), path, value)
  with pytest.raises(ValueError) as error:
    _parse(values)
  assert all(part in str(error.value) for part in told), error.value


@section
class _Inner:
  size: Annotated[int, Field(ge=1)] = 4


@section
class _Lines:
  kind: Literal["lines"] = "lines"
  paths: tuple[str, ...]
  prefix: str | None = None


@section
class _Other:
  kind: Literal["other"] = "other"


@section
class _Outer:
  inner: _Inner = _Inner()
  source: Annotated[_Other | _Lines, Field(discriminator="kind")] | None = None
  by_name: dict[str, _Inner]


def test_a_page_fills_nested_sections_that_are_given_as_dicts():
  made = page(_Outer, source=dict(kind="lines", paths=["a"]), by_name=dict(x={}, y=dict(size=2)))
  assert made.to_dict() == {
    "inner": {"size": 4},
    "source": {"kind": "lines", "paths": ("a",), "prefix": None},
    "by_name": {"x": {"size": 4}, "y": {"size": 2}},
  }
  with pytest.raises(TypeError, match=r"_Inner has no field 'sise'.*'size'"):
    page(_Outer, by_name=dict(x=dict(sise=3)))
  with pytest.raises(TypeError, match="tag of none of"):
    page(_Outer, source=dict(kind="line", paths=()), by_name={})


@pytest.mark.parametrize("name", [name for name in _VARIANTS if name.startswith("sbp")])
def test_the_arms_to_compare_have_the_same_seed_schedule_and_steps(name):
  for variant in _VARIANTS[name]:
    config = _parse(_page(name, variant).to_dict())
    arms = {
      stage.name: stage.config
      for stage in _stages(config)
      if stage.name.startswith("arms/") and "matched_inputs" not in vars(stage.config)
    }
    assert {"arms/baseline", "arms/sbp", "arms/oracle"} <= arms.keys()
    for part in ("total_targets", "training", "seq_len", "mesh", "evaluation"):
      expected = getattr(arms["arms/baseline"], part)
      assert all(getattr(arm, part) == expected for arm in arms.values()), part
    seeds = {name.endswith("-2"): arm.seed for name, arm in arms.items()}
    assert seeds[False] == config.seed
    assert all(arm.seed == seeds[name.endswith("-2")] for name, arm in arms.items())


def test_each_training_of_an_arm_reads_a_draw_of_its_own():
  stages = {stage.name: stage for stage in _stages(_parse(_page("sbp_quick").to_dict()))}
  assert stages["arms/sbp-2"].inputs["sbp"] == "synthetic/sbp-2"
  assert stages["synthetic/sbp-2"].inputs["samples"] == "samples/sbp-2"
  assert stages["samples/sbp-2"].inputs["model"] == "synthesizer/nearest-2"
  assert "arms/oracle-2" not in stages


def test_entigraph_is_the_continued_pretraining_of_the_paper():
  stages = _stages(_parse(_page("entigraph_quality").to_dict()))
  (arm,) = [stage for stage in stages if stage.name == "arms/entigraph/0"]
  assert arm.plan.tokens == 910_000_000  # two epochs of 455M
  assert arm.plan.state_bytes == 16 * 8_030_261_248  # Llama-3-8B's parameters
  found = to_json(arm.config)
  expected = dict(batch_rows=16, peak_lr=5e-6, final_lr=0.0, warmup_fraction=0.05)
  expected |= dict(b1=0.9, b2=0.999, eps=1e-8, clip_norm=1.0)
  assert found["training"] | expected == found["training"]
  assert (found["seq_len"], found["replay_share"], found["weight_decay"]) == (2048, 0.1, 0.01)


@pytest.mark.parametrize(
  ("name", "variant", "synthetic", "unique", "parameters"),
  [
    ("sbp_3b", "200b", 75e9, 10e9, 2.74e9),
    ("sbp_3b", "1t", 125e9, 50e9, 2.74e9),
    ("sbp_6b", "1t", 250e9, 50e9, 5.87e9),
  ],
)
def test_sbp_at_scale_has_the_tokens_of_the_paper(name, variant, synthetic, unique, parameters):
  config = _parse(_page(name, variant).to_dict())
  stages = {stage.name: stage for stage in _stages(config)}
  arm = stages["arms/sbp"]
  assert arm.config.mixture["sbp"] * config.total_tokens == pytest.approx(synthetic)
  assert stages["tokens"].config.unique_tokens == unique
  assert config.total_tokens / unique == 20  # passes of the baseline
  assert arm.config.total_targets == config.total_tokens
  assert arm.plan.state_bytes == pytest.approx(16 * parameters, rel=0.01)
  assert stages["samples/sbp"].plan.tokens >= synthetic
