"""Sequential against parallel test-time compute on math questions (s1; arXiv 2501.19393).

  checkpoint, questions -> responses/ARM -> grades/ARM

An arm is one setting in which a given model answers every question: a maximum of thinking, a number
of suppressed ends, several samples and a vote, a prompt that asks for a length, or some of these.
Arms that differ in one setting make up a method, whose accuracy against thinking tokens is a curve.
"""

from typing import Any

from selfimprove_jax.pipelines.stages import Plan, Stage

_FUNCTIONS = "budget_forcing_stages"
_OF_THE_REPORT = ("method", "demanded", "votes")  # what sampling does not depend on


def build(config: dict[str, Any]) -> list[Stage]:
  """The stages of a config that `budget_forcing_config.check` has passed, in order."""
  c = config
  stages = [
    Stage("checkpoint", f"{_FUNCTIONS}:checkpoint", {"path": c["checkpoint"]}),
    Stage("questions", f"{_FUNCTIONS}:questions", c["questions"]),
  ]
  stages += [_responses(c, name, arm) for name, arm in c["arms"].items()]
  stages += [
    Stage(
      f"grades/{name}",
      f"{_FUNCTIONS}:grade",
      c["grading"],
      {"questions": "questions", "responses": f"responses/{name}"},
    )
    for name in c["arms"]
  ]
  return stages


def _responses(c, name, arm):
  sampled = {key: value for key, value in arm.items() if key not in _OF_THE_REPORT}
  most = c["engine"]["max_length"] if arm["max_tokens"] == "auto" else arm["max_tokens"]
  draws = max(arm["num_samples"], arm["max_tries"])
  tokens = c["questions"]["num_questions"] * draws * (most + c["response"]["max_answer_tokens"])
  config = {
    "mesh": c["mesh"],
    "compute": c["compute"],
    "engine": c["engine"],
    "prompt": c["prompt"],
    "thinking": c["thinking"],
    **c["response"],
    "arm": sampled,
    "seed": c["seed"],
  }
  return Stage(
    f"responses/{name}",
    f"{_FUNCTIONS}:respond",
    config,
    {"checkpoint": "checkpoint", "questions": "questions"},
    Plan(tokens),
    uses_devices=True,
  )
