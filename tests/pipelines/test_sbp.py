"""The list of stages of an SBP config, and the check of its keys."""

import copy
import importlib

import pytest

from selfimprove_jax.pipelines import runner, sbp, sbp_config


@pytest.fixture
def config():
  return importlib.import_module("configs.sbp_quick").get_config("smoke").to_dict()


def _sections(config, path=""):
  """Path of every nested section whose keys some function fixes."""
  yield path
  for key, value in config.items():
    free = path == "" and key == "arms"  # arms and mixtures are named by the user
    if isinstance(value, dict) and key not in ("mixture", "special_tokens", "options"):
      inner = f"{path}.{key}" if path else key
      if free:
        yield from (f"arms.{name}" for name in value)
      else:
        yield from _sections(value, inner)


def _at(config, path):
  for key in path.split(".") if path else []:
    config = config[key]
  return config


def test_an_unknown_key_in_any_section_is_refused_by_name(config):
  sections = [*_sections(config), "corpus.options", "tokenizer.special_tokens"]
  assert len(sections) > 25
  for path in sections:
    changed = copy.deepcopy(config)
    _at(changed, path)["misspelt"] = 1
    with pytest.raises(ValueError, match="misspelt") as error:
      runner.check(changed)
    assert path.rpartition(".")[2] in str(error.value)


def test_a_missing_key_in_any_section_is_refused_by_name(config):
  with_default = {
    *("pairs.search.method", "pairs.search.exact_below", "corpus.split.shingle_size"),
    *("model.rope_theta", "model.dtype"),
    *("synthesis.sampling.temperature", "synthesis.sampling.top_k", "synthesis.sampling.top_p"),
    *("corpus.options.packages", "corpus.options.min_chars"),
  }
  tried = 0
  for path in _sections(config):
    for key in _at(config, path):
      if f"{path}.{key}" in with_default:
        continue
      changed = copy.deepcopy(config)
      del _at(changed, path)[key]
      with pytest.raises(ValueError, match=key):
        runner.check(changed)
      tried += 1
  assert tried > 100


def test_the_check_passes_what_may_be_left_out(config):
  del config["pairs"]["search"]["method"]
  runner.check(config)


def test_unknown_choices_are_refused_with_the_known_ones(config):
  for section, key, known in (
    ("corpus", "source", "jsonl"),
    ("corpus", "on_error", "skip"),
    ("embeddings", "method", "tfidf_svd"),
  ):
    changed = copy.deepcopy(config)
    changed[section][key] = "something"
    with pytest.raises(ValueError, match=f"something.*{known}"):
      runner.check(changed)
  with pytest.raises(ValueError, match=r"pipeline='something'.*sbp"):
    runner.check(config | {"pipeline": "something"})


def test_an_option_of_another_source_is_refused(config):
  config["corpus"] |= {"source": "jsonl", "options": {"paths": "x.jsonl", "min_chars": 4}}
  with pytest.raises(ValueError, match="min_chars"):
    runner.check(config)
  del config["corpus"]["options"]["min_chars"]
  runner.check(config)  # and reads nothing


def test_an_arm_of_an_unknown_source_is_refused(config):
  config["arms"]["sbp"]["mixture"] = {"unique": 0.5, "sbq": 0.5}
  with pytest.raises(ValueError, match=r"sbq.*unconditional"):
    sbp.build(config)


def test_only_the_stages_that_some_arm_needs_are_built(config):
  for name in ("sbp", "unconditional", "baseline_all_in"):
    del config["arms"][name]
  names = [stage.name for stage in sbp.build(config)]
  assert names == ["documents", "tokenizer", "tokens", "seed", "arms/baseline", "arms/oracle"]


def test_the_random_pairs_control_has_a_synthesizer_of_its_own(config):
  config["arms"]["control"] = config["arms"]["sbp"] | {
    "mixture": {"unique": 0.5, "random_pairs": 0.5}
  }
  sbp_config.check(config)
  stages = {stage.name: stage for stage in sbp.build(config)}
  assert stages["synthesizer/random"].config["pairs"] == "random"
  assert stages["samples/random_pairs"].inputs["model"] == "synthesizer/random"
  assert stages["arms/control"].inputs["random_pairs"] == "synthetic/random_pairs"


def test_embeddings_of_the_seed_model_read_the_seed(config):
  config["embeddings"] = {
    "method": "seed_model",
    "mesh": config["mesh"],
    "batch_size": 8,
    "seq_len": 64,
  }
  sbp_config.check(config)
  stages = {stage.name: stage for stage in sbp.build(config)}
  assert stages["embeddings"].inputs["seed"] == "seed"


def test_all_in_costs_are_counted_once_each(config):
  assert sbp.all_in_stages("sbp", config) == [
    "seed",
    "embeddings",
    "synthesizer/nearest",
    "samples/sbp",
    "arms/sbp",
  ]
  assert sbp.all_in_stages("unconditional", config) == [
    "seed",
    "samples/unconditional",
    "arms/unconditional",
  ]
  assert sbp.all_in_stages("baseline", config) == ["arms/baseline"]


def test_the_label_of_an_arm_changes_no_stage(config):
  before = sbp.build(config)
  config["arms"]["sbp"]["label"] = "another"
  assert sbp.build(config) == before


def test_every_pretraining_uses_its_own_weight_decay_and_dropout(config):
  stages = {stage.name: stage.config for stage in sbp.build(config)}
  assert stages["arms/oracle"]["weight_decay"] == config["arms"]["oracle"]["weight_decay"]
  assert stages["arms/oracle"]["model"]["dropout_rate"] == 0.0
  assert stages["arms/baseline"]["model"]["dropout_rate"] == 0.1
