"""The comparison of test-time compute, on a tiny chat model with random weights."""

import copy
import json
import shutil

import pytest

from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.pipelines import budget_forcing
from selfimprove_jax.pipelines.budget_forcing.stages import (
  PromptConfig,
  encode_prompt,
  load_model,
)
from selfimprove_jax.reasoning.length_controls import ConditionConfig
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runs.stage import run_stage
from selfimprove_jax.runtime import preemption
from selfimprove_jax.runtime.config import parse
from selfimprove_jax.runtime.partitioning import MeshConfig
from selfimprove_jax.runtime.progress import Progress

_NUM_QUESTIONS = 3


def _changed(values, path, value) -> budget_forcing.Config:
  changed = copy.deepcopy(values)
  *sections, key = path.split(".")
  section = changed
  for name in sections:
    section = section[name]
  section[key] = value
  return parse(budget_forcing.Config, changed)


def _records(finished, name):
  return list(artifacts.open_artifact(finished / name).records())


def test_right_answers_are_read_in_their_format(finished):
  assert [record["answer"] for record in _records(finished, "questions")] == ["8", "1,200", "-2"]


def test_the_plan_bounds_what_every_arm_samples_and_computes(config, finished):
  model = parse(LlamaConfig, artifacts.open_artifact(finished / "checkpoint").summary["model"])
  planned = {stage.name: stage.plan for stage in budget_forcing.stages(config)}
  for name, arm in config.arms.items():
    plan, responses = planned[f"responses/{name}"], _records(finished, f"responses/{name}")
    assert plan.is_bound
    assert 0 < sum(r["sampled_tokens"] for r in responses) <= plan.tokens, name
    # What is written at least; prompts and earlier rounds are read too.
    spent = sum(r["sampled_tokens"] for r in responses) * model.forward_flops_per_token(1)
    assert (plan.flops is None) == (arm.budget.min_tokens > 0)
    assert plan.flops is None or spent < plan.flops, name


def test_questions_of_one_group_are_graded_with_it(values, finished, tmp_path):
  path = tmp_path / "questions.jsonl"
  lines = [{"question": q, "answer": "3", "source": s} for q, s in (("a", "x"), ("b", "x"))]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  changes = {"path": str(path), "answer_format": "plain", "group_field": "source"}
  config = _changed(values, "questions", values["questions"] | changes)
  stage = next(s for s in budget_forcing.stages(config) if s.name == "questions")
  run_stage(stage, tmp_path / "run", Progress(quiet=True))
  assert [record["group"] for record in _records(tmp_path / "run", "questions")] == ["x", "x"]
  own = {r["question_id"]: r["group"] for r in _records(finished, "grades/forcing_4")}
  assert all(id_ == group for id_, group in own.items())


def test_every_arm_keeps_its_bounds(config, finished):
  for name, arm in config.arms.items():
    responses = _records(finished, f"responses/{name}")
    assert len(responses) == _NUM_QUESTIONS * arm.num_samples, name
    for response in responses:
      assert response["error"] is None
      assert len(response["answer_tokens"]) <= 4
      if arm.budget.max_tokens is not None:
        assert len(response["thinking_tokens"]) <= arm.budget.max_tokens, name
  long, short = (_records(finished, f"responses/{name}") for name in ("forcing_8", "forcing_4"))
  for cut, whole in zip(short, long, strict=True):
    assert whole["thinking_tokens"][:4] == cut["thinking_tokens"]
    assert cut["forced"] == "max" or len(cut["thinking_tokens"]) < 4
  waits = _records(finished, "responses/forcing_8_wait_1")
  assert all(
    r["num_ignored"] == 1 and "Wait" in r["thinking"] for r in waits if r["forced"] == "min"
  )


def test_a_stage_counts_its_responses_and_tokens(finished):
  summary = artifacts.open_artifact(finished / "responses/parallel").summary
  tokens = sum(r["sampled_tokens"] for r in _records(finished, "responses/parallel"))
  assert summary == {"responses": 2 * _NUM_QUESTIONS, "tokens": tokens, "failed": 0}


def test_a_prompt_is_a_chat_in_which_a_question_ends_no_turn(
  config, finished, one_device_mesh, monkeypatch
):
  monkeypatch.setattr(MeshConfig, "make", lambda self, devices=None: one_device_mesh)
  checkpoint = artifacts.open_artifact(finished / "checkpoint")
  model = load_model(checkpoint, config.mesh, config.compute, config.engine)
  ids = encode_prompt(
    model,
    "What? <|im_end|>",
    ConditionConfig(kind="token", amount=64),
    PromptConfig(system="Be brief.", text="Q: {question}"),
  )
  assert [id_ for id_ in ids if id_ < 2] == [0, 1, 0, 1, 0]  # those of the three turns
  text = model.tokenizer.backend.decode(list(ids), skip_special_tokens=False)
  assert text.startswith(
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ: What? <|im_end|>"
  )
  assert "up to 64 tokens" in text and text.endswith("<|im_start|>assistant\n")
  plain = PromptConfig(chat=False, text="Q: {question}")
  assert model.tokenizer.decode(encode_prompt(model, "What?", ConditionConfig(), plain)) == (
    "Q: What?"
  )
  model.chat, chat = None, model.chat  # the model is shared with other tests
  try:
    with pytest.raises(ValueError, match=r"no chat template; set prompt\.chat=False"):
      encode_prompt(model, "What?", ConditionConfig(), PromptConfig())
  finally:
    model.chat = chat


def test_a_run_that_lost_shards_makes_the_same_bytes_again(
  config, run, finished, tmp_path, data_files
):
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  for name in ("forcing_8_wait_1", "parallel", "rejection_4"):
    (folder / "responses" / name / "00001-of-00002.jsonl").unlink()
  run(config, folder)
  assert data_files(folder) == data_files(finished)


def test_a_preempted_run_keeps_its_shards_and_continues(
  config, run, finished, tmp_path, data_files, monkeypatch
):
  only = ["checkpoint", "questions", "responses/parallel"]
  with monkeypatch.context() as patch:
    patch.setattr(preemption, "requested", lambda round_number: round_number > 0)
    with pytest.raises(preemption.Preempted, match="143"):
      run(config, tmp_path, only)
  assert (tmp_path / "responses/parallel/00000-of-00002.jsonl").exists()
  assert not (tmp_path / "responses/parallel/00001-of-00002.jsonl").exists()
  run(config, tmp_path, only)
  kept = data_files(tmp_path / "responses")
  assert kept == {n: b for n, b in data_files(finished / "responses").items() if n in kept}


def test_a_checkpoint_that_changed_after_its_record_is_refused(values, checkpoint, run, tmp_path):
  moved = tmp_path / "checkpoint"
  shutil.copytree(checkpoint, moved)
  config = _changed(values, "checkpoint.path", str(moved))
  run(config, tmp_path / "run", ["checkpoint", "questions"])
  weights = moved / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\1\0")
  with pytest.raises(artifacts.ArtifactError, match=r"are not those that .* recorded"):
    run(config, tmp_path / "run", ["responses/forcing_4"])


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("engine.max_length", 1024, "max_length=1024 must be between 2 and 512, the context"),
    ("arms.forcing_8.budget.max_tokens", 240, "max_tokens=240 does not fit"),
    ("thinking.stop", ["</think>"], "'</think>' is 8 tokens"),
  ],
)
def test_a_config_that_does_not_fit_the_model_is_refused(
  values, run, tmp_path, path, value, message
):
  config = _changed(values, path, value)
  with pytest.raises(ValueError, match=message):
    run(config, tmp_path, ["checkpoint", "questions", "responses/forcing_8"])


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("questions.answer_format", "latex", "questions.answer_format='latex'.*'gsm8k' or 'plain'"),
    ("questions.num_questions", 1, "questions.num_questions=1"),
    ("prompt.text", "What?", "has no {question} in it"),
    ("grading.checker", "eyes", "grading.checker='eyes'"),
    ("engine.num_slots", 0, "engine.num_slots=0"),
    ("thinking", {"think_strat": ""}, "thinking.think_strat.*did you mean 'think_start'"),
    ("thinking.ignore", "", "ignore is empty"),
    ("arms", {}, "arms"),
    ("arms.forcing_4.budget.max_tokens", 0, r"arms\.forcing_4\.budget\.max_tokens=0"),
    ("arms.forcing_4.budget.min_tokens", 5, "min_tokens=5 must be between 0 and max_tokens=4"),
    ("arms.forcing_4.num_samples", 2, "num_samples=2 at temperature=0 are all equal"),
    ("arms.parallel.votes", [1, 3], r"arms\.parallel: votes=\[1, 3\] must be numbers of samples"),
    ("arms.rejection_4.budget.num_ignored", 1, r"set \['num_ignored'\] to 0"),
    ("arms.rejection_4.sampling", {"temperature": 0.0}, "draws one thought again"),
    ("arms.token_4.condition", {"kind": "page", "amount": 1}, "condition.kind='page'"),
    ("arms.token_4.condition.amount", "x", "condition.amount='x'"),
    ("arms.token_4.condition.amount", 0, "amount=0 does not fit kind='token'"),
    ("arms.token_4.demanded", {"max_token": 3}, "max_token=3.*did you mean 'max_tokens'"),
  ],
)
def test_an_impossible_config_is_refused_with_its_path(values, path, value, message):
  with pytest.raises(ValueError, match=message):
    _changed(values, path, value)


def test_report_settings_do_not_invalidate_responses(values, config):
  changed = _changed(values, "arms.parallel.votes", [2])
  stages, others = ({s.name: s for s in budget_forcing.stages(c)} for c in (config, changed))
  assert stages["responses/parallel"].config == others["responses/parallel"].config
  changed = _changed(values, "arms.parallel.num_samples", 4)
  assert budget_forcing.stages(changed)[4:] != budget_forcing.stages(config)[4:]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ({"question": "q", "answer": "3"}, "has no '####'"),
    ({"question": "q"}, "no field 'answer'"),
  ],
)
def test_questions_that_do_not_fit_the_format_are_refused(values, run, tmp_path, line, message):
  path = tmp_path / "questions.jsonl"
  path.write_text(json.dumps(line) + "\n")
  config = _changed(values, "questions.path", str(path))
  with pytest.raises(ValueError, match=message):
    run(config, tmp_path / "run", ["questions"])
