"""The config of SBP and its list of stages."""

import json
import re
from typing import Any

import pytest

from configs import sbp_quick
from selfimprove_jax.pipelines.sbp import pipeline
from selfimprove_jax.pipelines.sbp.config import Config
from selfimprove_jax.runs.stage import Stage
from selfimprove_jax.runtime.config import parse


def _config(**changes: Any) -> Config:
  """The smoke run's config with knobs changed: `arms__sbp__label` stands for arms.sbp.label."""
  values = json.loads(json.dumps(sbp_quick.get_config("smoke").to_dict()))
  for path, value in changes.items():
    *sections, key = path.split("__")
    found = values
    for name in sections:
      found = found[name]
    found[key] = value
  return parse(Config, values)


def _stages(config: Config) -> dict[str, Stage]:
  return {stage.name: stage for stage in pipeline.stages(config)}


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    (dict(pipeline="sbq"), "pipeline='sbq': must be 'sbp'"),
    (dict(total_tokens=10), "total_tokens=10 must be at least the 512 tokens of one optimizer"),
    (dict(seed_model__total_tokens=511), "seed_model.total_tokens=511 must be at least the 512"),
    (dict(training__batch_rows=500), "total_tokens=48000 must be at least the 64000"),
    (dict(arms__sbp__mixture={"unique": 0.5}), "arms.sbp.mixture: the shares sum to 0.5"),
    (dict(arms__sbp__mixture={"sbq": 1.0}), "arms.sbp.mixture: there is no source 'sbq'"),
    (dict(arms__sbp__mixture={"sbq": 1.0}), "did you mean 'sbp'?"),
    (dict(arms__sbp__mixture={"unique": 1.5, "sbp": -0.5}), "arms.sbp.mixture.unique=1.5"),
    (dict(seed_model__mixture={"sbp": 1.0}), "seed_model.mixture: there is no source 'sbp'"),
    (dict(arms__sbp__all_in_of="oracel"), "arms.sbp.all_in_of='oracel' must be another arm"),
    (dict(arms__sbp__all_in_of="oracel"), "did you mean 'oracle'?"),
    (dict(arms__sbp__all_in_of="baseline_all_in"), "must be an arm that trains on `total_tokens`"),
    (dict(arms__sbp__all_in_of="sbp"), "arms.sbp.all_in_of='sbp' must be another arm"),
    (dict(arms={}), "there is no arm `baseline`"),
    (dict(pair_tokens=63), "pair_tokens=63 must be more than tokens.max_document_tokens=60"),
    (dict(tokens__max_document_tokens=61), "synthesis.prompt_buckets=(30, 62)"),
    (dict(tokens__oracle_tokens=11_999), "tokens.oracle_tokens=11999 must be at least"),
    (dict(synthesis__prompt_buckets=()), "synthesis.prompt_buckets=[]"),
    (dict(synthesis__num_slots=0), "synthesis.num_slots=0"),
    (dict(synthesizer__passes=0.0), "synthesizer.passes=0.0"),
    (dict(synthesizer__gate=-1.0), "synthesizer.gate=-1.0"),
    (dict(tokenizer__vocab_size=2000), "tokenizer.vocab_size=2000 must be at most model.vocab"),
    (dict(corpus__split__test_fraction=0.0), "corpus.split.test_fraction=0.0 must be above 0"),
    (dict(corpus__source__kind="json"), "corpus.source.kind='json'"),
    (dict(corpus__source__min_char=4), "did you mean 'min_chars'?"),
    (dict(corpus__on_error="ignore"), "corpus.on_error='ignore': must be 'raise' or 'skip'"),
    (dict(embeddings__method="bert"), "embeddings.method='bert'"),
    (dict(pairs__filters__max_jaccard=1.5), "pairs.filters.max_jaccard=1.5"),
    (dict(comparison__assumed_seed_noise=-0.1), "comparison.assumed_seed_noise=-0.1"),
  ],
)
def test_a_config_that_makes_no_sense_is_refused_by_path(changes, told):
  with pytest.raises(ValueError, match=re.escape(told)):
    _config(**changes)


def test_a_missing_knob_is_refused_by_path():
  values = sbp_quick.get_config("smoke").to_dict()
  del values["pairs"]["search"]["num_neighbors"], values["arms"]["sbp"]["label"]
  with pytest.raises(ValueError) as error:
    parse(Config, values)
  assert str(error.value).splitlines() == [
    "pairs.search.num_neighbors: is missing; the page must give it",
    "arms.sbp.label: is missing; the page must give it",
  ]


def test_a_jsonl_corpus_takes_the_place_of_the_docstrings_and_nothing_is_read():
  config = _config(corpus__source={"kind": "jsonl", "paths": ["nowhere.jsonl"]})
  assert _stages(config)["documents"].config.corpus.source.paths == ("nowhere.jsonl",)


def test_only_the_stages_that_some_arm_needs_are_built():
  arms = sbp_quick.get_config("smoke").to_dict()["arms"]
  config = _config(arms={name: arms[name] for name in ("baseline", "oracle")})
  names = ["documents", "tokenizer", "tokens", "seed", "arms/baseline"]
  names += ["arms/baseline-2", "arms/oracle"]
  assert list(_stages(config)) == names


def test_the_random_pairs_control_has_a_synthesizer_of_its_own():
  arms = sbp_quick.get_config("smoke").to_dict()["arms"]
  control = arms["sbp"] | {"mixture": {"unique": 0.5, "random_pairs": 0.5}}
  stages = _stages(_config(arms=arms | {"control": control}))
  assert stages["synthesizer/random"].config.pairs == "random"
  assert stages["samples/random_pairs"].inputs["model"] == "synthesizer/random"
  assert stages["arms/control"].inputs["random_pairs"] == "synthetic/random_pairs"


def test_embeddings_of_the_seed_model_read_the_seed():
  stages = _stages(_config(embeddings={"method": "seed_model", "batch_size": 8}))
  assert stages["embeddings"].inputs["seed"] == "seed"
  assert stages["embeddings"].config.seq_len == 128
  assert stages["embeddings"].uses_devices


def test_all_in_costs_are_counted_once_each():
  config = _config()
  assert pipeline.all_in_stages("sbp", config) == [
    "seed",
    "embeddings",
    "synthesizer/nearest",
    "samples/sbp",
    "arms/sbp",
  ]
  assert pipeline.all_in_stages("unconditional", config) == [
    "seed",
    "samples/unconditional",
    "arms/unconditional",
  ]
  assert pipeline.all_in_stages("baseline", config) == ["arms/baseline"]


def test_an_arm_of_equal_flops_reads_the_stages_that_the_other_arm_needs():
  arm = _stages(_config())["arms/baseline_all_in"]
  costs = [arm.inputs[name] for name in arm.config.matched_inputs]
  assert costs == ["seed", "embeddings", "synthesizer/nearest", "samples/sbp"]


def test_the_label_of_an_arm_changes_no_stage():
  assert _stages(_config()) == _stages(_config(arms__sbp__label="another"))


def test_every_pretraining_uses_its_own_weight_decay_and_dropout():
  config = _config()
  stages = {name: stage.config for name, stage in _stages(config).items()}
  assert stages["arms/oracle"].weight_decay == config.arms["oracle"].weight_decay == 0.1
  assert stages["arms/oracle"].model.dropout_rate == 0.0
  assert stages["arms/baseline"].model.dropout_rate == 0.1


def test_what_must_agree_is_given_to_every_stage_that_needs_it():
  stages = _stages(_config(seed=5, split_seed=6, pair_tokens=100, shingle_size=7))
  by_field = {
    field: {
      name: getattr(s.config, field) for name, s in stages.items() if hasattr(s.config, field)
    }
    for field in ("seed", "seq_len", "shingle_size")
  }
  assert by_field["seed"].pop("documents") == 6
  assert by_field["seed"].pop("synthetic/sbp-2") == 5  # of the sample that quality is measured on
  for name, seed in by_field["seed"].items():
    assert seed == pipeline.seed_of(5, int(name.endswith("-2"))), name
  for name in ("synthesizer/nearest", "synthesizer/nearest-2"):
    assert by_field["seq_len"].pop(name) == 100
  assert stages["pairs"].config.pair_tokens == 100
  assert set(by_field["seq_len"].values()) == {128}
  assert set(by_field["shingle_size"].values()) == {7}
  assert by_field["shingle_size"].keys() >= {"pairs", "synthetic/sbp", "synthetic/unconditional"}


def test_runs_with_neighboring_seeds_share_no_training():
  seeds = [pipeline.seed_of(seed, k) for seed in range(50) for k in range(5)]
  assert len(set(seeds)) == len(seeds)
  assert all(0 <= seed < 2**32 for seed in seeds)
  assert pipeline.seed_of(7, 0) == 7


def test_another_training_seed_keeps_documents_and_tokens():
  one, other = _stages(_config()), _stages(_config(seed=1))
  same = [name for name in one if one[name] == other[name]]
  assert same == ["documents", "tokenizer", "tokens"]


def test_benchmarks_are_looked_for_in_the_corpus_and_in_all_samples_once_they_are_named():
  plain = _stages(_config())
  checked = _stages(_config(decontamination__data_dir="evals"))
  changed = {name for name in plain if plain[name] != checked[name]}
  assert changed == {"documents", *(name for name in plain if name.startswith("synthetic/"))}
  for name in changed:
    assert checked[name].config.decontamination.data_dir == "evals"
    assert not hasattr(plain[name].config, "decontamination")
