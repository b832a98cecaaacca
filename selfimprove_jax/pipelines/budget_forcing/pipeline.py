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
from selfimprove_jax.pipelines.common.checkpoints import checkpoint
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
  longest = arm.budget.max_tokens or c.engine.max_length
  samples = c.questions.num_questions * max(arm.num_samples, arm.max_tries)
  return Stage(
    f"responses/{name}",
    respond,
    _part(RespondConfig, c, setting=setting),
    {"checkpoint": "checkpoint", "questions": "questions"},
    Plan(tokens=samples * (longest + c.response.max_answer_tokens)),
    uses_devices=True,
  )


def _part(section: type[T], source: Any, **others: Any) -> T:
  """Returns a section with the fields of `others`, and the rest as in a section that has them."""
  names = [field.name for field in dataclasses.fields(section) if field.name not in others]
  return section(**others, **{name: getattr(source, name) for name in names})
