"""The config of the budget forcing pipeline: which keys each section may and must have."""

from typing import Any

from selfimprove_jax.evaluation import math_answers
from selfimprove_jax.pipelines import budget_forcing_stages, config_check
from selfimprove_jax.sampling import budget_forcing, length_controls

SECTIONS = (
  *("pipeline", "title", "seed", "mesh", "runtime"),
  *("checkpoint", "questions", "prompt", "thinking", "response"),
  *("compute", "engine", "arms", "grading"),
)
_ARM = (
  *("method", "demanded", "condition", "max_tokens", *budget_forcing_stages.BUDGET_FIELDS),
  *("num_samples", "votes", "max_tries", "sampling"),
)
# Sections that are read key by key.
_KEYS = {
  "runtime": ("parallel_stages",),
  "response": ("max_answer_tokens", "questions_per_shard"),
  "engine": ("num_slots", "max_length"),
}
# Section -> the function whose arguments it holds, and those it gets from elsewhere.
_ARGUMENTS: dict[str, tuple[str, tuple[str, ...]]] = {
  "mesh": ("partitioning:make_mesh", ("devices",)),
  "questions": ("pipelines.budget_forcing_stages:questions", ("context",)),
  "prompt": (
    "pipelines.budget_forcing_model:encode_prompt",
    ("model", "question", "condition"),
  ),
  "thinking": ("sampling.thinking:ThinkingFormat", ()),
  "grading": ("pipelines.budget_forcing_stages:grade", ("context",)),
}


def check(config: dict[str, Any]) -> None:
  """Compares every section with what reads it, before anything runs.

  Raises:
    ValueError: a section or a key is missing or unknown; or a value is out of its range, or does
      not go with another.
  """
  config_check.compare("the config", config, required=SECTIONS, allowed=SECTIONS)
  for section, keys in _KEYS.items():
    config_check.compare(f"section {section!r}", config[section], required=keys, allowed=keys)
    _check_positive(section, config[section])
  for section, (function, given) in _ARGUMENTS.items():
    config_check.compare_section(config, section, function, given)
  if "{question}" not in config["prompt"]["text"]:
    raise ValueError(f"prompt.text={config['prompt']['text']!r} has no {{question}} in it")
  _check_questions(config)
  if not config["arms"]:
    raise ValueError("there are no arms; name at least one")
  for name, arm in config["arms"].items():
    config_check.compare(f"section 'arms.{name}'", arm, required=_ARM, allowed=_ARM)
    try:
      _check_arm(arm, config)
    except (TypeError, ValueError) as error:
      raise ValueError(f"arms.{name}: {error}") from None


def _check_positive(section, values):
  for key, value in values.items():
    if value < 1:
      raise ValueError(f"{section}.{key}={value} must be at least 1")


def _check_questions(config):
  questions = config["questions"]
  formats = sorted(budget_forcing_stages.ANSWER_FORMATS)
  if questions["answer_format"] not in formats:
    raise ValueError(
      f"questions.answer_format={questions['answer_format']!r} is unknown; there are {formats}"
    )
  if questions["num_questions"] < 2:
    raise ValueError(
      f"questions.num_questions={questions['num_questions']}: a standard error needs at least 2"
    )
  math_answers.check_checker(config["grading"]["checker"])


def _check_arm(arm, config):
  keys = ("min_tokens", "max_tokens")
  config_check.compare("demanded", arm["demanded"], required=keys, allowed=keys)
  sampling = budget_forcing_stages.SamplingConfig(**arm["sampling"])
  if arm["condition"] is not None:
    keys = ("kind", "amount")
    config_check.compare("condition", arm["condition"], required=keys, allowed=keys)
    length_controls.instruction(**arm["condition"])
  window = config["engine"]["max_length"]
  budget_forcing.Budget(
    max_tokens=window if arm["max_tokens"] == "auto" else arm["max_tokens"],
    max_answer_tokens=config["response"]["max_answer_tokens"],
    **{name: arm[name] for name in budget_forcing_stages.BUDGET_FIELDS},
  )
  samples, votes = arm["num_samples"], arm["votes"]
  if samples < 1 or not votes or not all(1 <= k <= samples for k in votes):
    raise ValueError(f"votes={votes} must be numbers of samples, of 1 to num_samples={samples}")
  if samples > 1 and sampling.temperature == 0:
    raise ValueError(f"num_samples={samples} at temperature=0 are all one; draw above 0")
  if not arm["max_tries"]:
    return
  if arm["max_tries"] < 0 or samples > 1:
    raise ValueError(f"max_tries={arm['max_tries']} must be at least 0, and goes with one sample")
  if sampling.temperature == 0:
    raise ValueError("rejection sampling (max_tries) at temperature=0 draws one thought again")
  used = [name for name in budget_forcing_stages.BUDGET_FIELDS if arm[name]]
  if used:
    raise ValueError(f"rejection sampling (max_tries) suppresses no ends: set {used} to 0")
