"""Sequential and parallel test-time compute on math questions, as a list of stages.

  checkpoint, questions -> responses/ARM -> grades/ARM

An arm is one setting in which a given model answers every question: a maximum of thinking, a number
of suppressed ends, several samples and a vote, a prompt that asks for a length, or several of
these. Arms that differ in one number form a method, whose accuracy against thinking tokens is a
curve (s1; arXiv 2501.19393).
"""

import dataclasses
from typing import Any, TypeVar

from selfimprove_jax.pipelines.budget_forcing.config import ArmConfig, Config
from selfimprove_jax.pipelines.budget_forcing.stages import (
  RespondConfig,
  SettingConfig,
  grade,
  questions,
  respond,
)
from selfimprove_jax.pipelines.common.checkpoints import checkpoint, planned_config
from selfimprove_jax.runs.stage import Plan, Stage

T = TypeVar("T")


def stages(config: Config) -> list[Stage]:
  """Returns the stages, each after those it reads."""
  graded = {
    f"grades/{name}": {"questions": "questions", "responses": f"responses/{name}"}
    for name in config.arms
  }
  return [
    Stage("checkpoint", checkpoint, config.checkpoint),
    Stage("questions", questions, config.questions),
    *(_responses(config, name, arm) for name, arm in config.arms.items()),
    *(Stage(name, grade, config.grading, inputs) for name, inputs in graded.items()),
  ]


def _responses(c: Config, name: str, arm: ArmConfig) -> Stage:
  # Only the setting: a change in how an arm is reported leaves its responses valid.
  setting = _part(SettingConfig, arm)
  return Stage(
    f"responses/{name}",
    respond,
    _part(RespondConfig, c, setting=setting),
    {"checkpoint": "checkpoint", "questions": "questions"},
    _plan(c, arm),
    uses_devices=True,
  )


def _plan(c: Config, arm: ArmConfig) -> Plan:
  """Bounds what an arm samples and computes from above; most thoughts end earlier.

  Each round of a thought, each try and the answer is a request that reads the prompt and the
  thought so far, and fills a window at most. How often an end is suppressed for `min_tokens` is
  not known before.
  """
  window, answer = c.engine.max_length, c.response.max_answer_tokens
  longest = arm.budget.max_tokens or window - answer
  if arm.max_tries:
    tokens, requests = arm.max_tries * (longest + 1) + answer, arm.max_tries + 1
  else:
    tokens = arm.num_samples * min(longest + answer, window)
    requests = arm.num_samples * (arm.budget.num_ignored + 2)
  questions, model = c.questions.num_questions, planned_config(c.checkpoint.path)
  flops = None
  if model is not None and not arm.budget.min_tokens:
    flops = questions * requests * window * model.forward_flops_per_token(window)
  return Plan(questions * tokens, flops, is_bound=True)


def _part(section: type[T], source: Any, **others: Any) -> T:
  """Returns a section with the fields of `others`, and the rest as in a section that has them."""
  names = [field.name for field in dataclasses.fields(section) if field.name not in others]
  return section(**others, **{name: getattr(source, name) for name in names})
