"""Stages of the comparison of test-time compute: questions, responses, grades."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from selfimprove_jax.data.corpora import JsonlConfig, read_documents
from selfimprove_jax.language_models import Reply
from selfimprove_jax.language_models.local import ComputeConfig, LocalModel
from selfimprove_jax.pipelines.common.checkpoints import load_model
from selfimprove_jax.reasoning import math_answers
from selfimprove_jax.reasoning.budget_forcing import BudgetConfig, fit, think_and_answer
from selfimprove_jax.reasoning.length_controls import ConditionConfig, think_within
from selfimprove_jax.reasoning.thinking import (
  Question,
  Response,
  Thinker,
  ThinkingFormat,
  tokenize,
)
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime.config import section
from selfimprove_jax.runtime.partitioning import LocalMeshConfig
from selfimprove_jax.sampling.engine import EngineConfig
from selfimprove_jax.sampling.requests import SamplingConfig

_GSM8K_MARK = "####"
_KEPT_IN_GRADES = ("question_id", "sample", "forced", "num_ignored", "sampled_tokens", "error")

_Count = Annotated[int, Field(ge=1)]


@section
class QuestionsConfig:
  """Questions with their right answers.

  Attributes:
    path: JSON-lines file, plain, `.gz` or `.zst`.
    answer_format: "gsm8k" if the answer follows "####" in its field, "plain" if it is the field.
    id_field: None makes ids of file and line.
    group_field: what questions that are alike share (a source, a template); standard errors are
      over these groups. None takes all questions as independent.
    num_questions: the first ones are taken; a standard error needs at least 2.
  """

  path: str
  question_field: str = "question"
  answer_field: str = "answer"
  answer_format: Literal["gsm8k", "plain"] = "gsm8k"
  id_field: str | None = None
  group_field: str | None = None
  num_questions: Annotated[int, Field(ge=2)]


def questions(context: Context, config: QuestionsConfig) -> dict[str, Any]:
  """Copies the first questions with their right answers.

  Raises:
    ValueError: a record lacks a field or its answer lacks the mark, two questions have the same id,
      or there are fewer than 2 questions.
  """
  source = {"paths": (config.path,), "id_field": config.id_field, "group_field": config.group_field}
  asked, right = (
    read_documents(JsonlConfig(text_field=field, **source))
    for field in (config.question_field, config.answer_field)
  )
  records = {}
  for question, answer in zip(asked, right, strict=True):
    if len(records) == config.num_questions:
      break
    if question.id in records:
      raise ValueError(
        f"two questions of {config.path} have the id {question.id!r}; each needs its own"
      )
    gold = answer.text
    if config.answer_format == "gsm8k":
      _, mark, gold = gold.rpartition(_GSM8K_MARK)
      if not mark:
        raise ValueError(f"the answer of {question.id!r} has no {_GSM8K_MARK!r}: {gold[-80:]!r}")
    record = {"id": question.id, "group": question.group, "question": question.text.strip()}
    records[question.id] = {**record, "answer": gold.strip()}
  if len(records) < 2:
    raise ValueError(
      f"{config.path} has {len(records)} questions; a standard error needs at least 2"
    )
  context.writer.write_jsonl("questions.jsonl", records.values())
  return {"questions": len(records)}


@section
class PromptConfig:
  """How a question becomes a prompt.

  Attributes:
    chat: use the checkpoint's chat template; otherwise the text is continued as it is.
    system: system message of the chat; empty for none.
    text: user message, in which "{question}" is replaced by the question.
  """

  chat: bool = True
  system: str = ""
  text: str = "{question}"

  def __post_init__(self) -> None:
    if "{question}" not in self.text:
      raise ValueError(f"text={self.text!r} has no {{question}} in it")


def encode_prompt(
  model: LocalModel, question: str, condition: ConditionConfig, prompt: PromptConfig
) -> tuple[int, ...]:
  """Returns the token ids of a question, up to where the model begins to speak.

  Raises:
    ValueError: a chat is asked for, and the model has no chat template.
  """
  text = prompt.text.replace("{question}", question)
  if condition.instruction:
    text += "\n\n" + condition.instruction
  if not prompt.chat:
    return (*model.prefix_ids, *model.tokenizer.encode(text))
  if model.chat is None:
    raise ValueError(f"the model {model.name} has no chat template; set prompt.chat=False")
  messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
  return tuple(model.chat.render([*messages, {"role": "user", "content": text}]))


@section
class SettingConfig:
  """How a model is made to think more or less.

  Attributes:
    condition: length that the prompt asks for.
    num_samples: independent responses to each question.
    max_tries: 0, or the tries per question of rejection sampling, which replaces budget forcing.
  """

  condition: ConditionConfig = ConditionConfig()
  budget: BudgetConfig = BudgetConfig()
  num_samples: _Count = 1
  max_tries: Annotated[int, Field(ge=0)] = 0
  sampling: SamplingConfig = SamplingConfig(temperature=0.0)

  def __post_init__(self) -> None:
    if self.num_samples > 1 and self.sampling.temperature == 0:
      raise ValueError(
        f"num_samples={self.num_samples} at temperature=0 are all equal; sample above 0"
      )
    if not self.max_tries:
      return
    if self.num_samples > 1:
      raise ValueError(f"max_tries={self.max_tries} needs num_samples=1, not {self.num_samples}")
    if self.sampling.temperature == 0:
      raise ValueError("rejection sampling (max_tries) at temperature=0 draws one thought again")
    ends = ("num_ignored", "min_tokens", "min_unstopped_tokens")
    if used := [name for name in ends if getattr(self.budget, name)]:
      raise ValueError(f"rejection sampling (max_tries) suppresses no ends: set {used} to 0")


@section
class ResponseConfig:
  """Limits of the responses, and how they are written.

  Attributes:
    questions_per_shard: questions per file, which is the unit of resumption.
  """

  max_answer_tokens: _Count
  questions_per_shard: _Count


@section
class RespondConfig:
  """Config of the stage `respond`."""

  mesh: LocalMeshConfig
  compute: ComputeConfig
  engine: EngineConfig
  prompt: PromptConfig
  thinking: ThinkingFormat
  response: ResponseConfig
  setting: SettingConfig
  seed: int


def respond(context: Context, config: RespondConfig) -> dict[str, Any]:
  """Answers every question in one setting.

  A response depends only on its question, its number and the seed. Processes of a pod job answer
  different shards of questions.

  Raises:
    ValueError: a prompt with its thinking and answer does not fit the engine's window.
    preemption.Preempted: SIGTERM came; whole shards are kept.
  """
  records = list(context.inputs["questions"].records())
  size = config.response.questions_per_shard
  with context.progress.track(None, label=context.name, unit="tokens") as bar:
    shards = context.shards(
      math.ceil(len(records) / size),
      count=lambda record: {
        "tokens": record["sampled_tokens"],
        "failed": int(record["error"] is not None),
      },
      on_made_elsewhere=lambda counts: bar.update(counts["tokens"]),
    )

    def on_reply(reply: Reply) -> None:
      bar.update(reply.usage.completion_tokens)
      shards.check_preemption()

    answer = None  # made for the first shard: a finished artifact loads no model
    for index in shards:
      answer = answer or _make_answer(context.inputs["checkpoint"], records, config, on_reply)
      responses = answer(slice(index * size, (index + 1) * size))
      shards.write_jsonl(index, map(dataclasses.asdict, responses))
  totals = shards.totals
  return {"responses": totals["records"], "tokens": totals["tokens"], "failed": totals["failed"]}


def _make_answer(
  checkpoint: Artifact,
  records: list[dict[str, Any]],
  config: RespondConfig,
  on_reply: Callable[[Reply], None],
) -> Callable[[slice], list[Response]]:
  """Returns a function that answers a slice of the questions in one setting."""
  c, setting, max_answer_tokens = config, config.setting, config.response.max_answer_tokens
  model = load_model(checkpoint, c.mesh, c.compute, c.engine)
  thinker = Thinker(
    model=model,
    tokens=tokenize(c.thinking, model.encode_markup),
    decode=model.tokenizer.decode,
    sampling=setting.sampling,
    seed=c.seed,
    on_reply=on_reply,
  )
  asked = [
    Question(r["id"], encode_prompt(model, r["question"], setting.condition, c.prompt))
    for r in records
  ]
  # Fitted to all questions, so that a response does not depend on the sizes of shards.
  budget = fit(
    setting.budget,
    asked,
    thinker.tokens,
    max_answer_tokens=max_answer_tokens,
    window=c.engine.max_length,
  )
  if setting.max_tries:
    method = functools.partial(
      think_within,
      max_tokens=budget.max_tokens,
      max_tries=setting.max_tries,
      num_slots=c.engine.num_slots,
    )
  else:
    method = functools.partial(think_and_answer, budget=budget, num_samples=setting.num_samples)
  return lambda part: method(asked[part], thinker, max_answer_tokens=max_answer_tokens)


@section
class GradingConfig:
  """How answers are compared with the right ones; see `math_answers`."""

  checker: Literal["math_verify", "numbers"] = "numbers"
  timeout_seconds: Annotated[float, Field(gt=0)] = 10.0
  num_processes: _Count = 2

  def __post_init__(self) -> None:
    math_answers.check_checker(self.checker)


def grade(context: Context, config: GradingConfig) -> dict[str, Any]:
  """Extracts the answer of each response and compares it with the right one."""
  asked = {record["id"]: record for record in context.inputs["questions"].records()}
  responses = list(context.inputs["responses"].records())
  answers = [
    math_answers.extract_answer(
      response["answer_start"] + response["answer"], numbers_only=config.checker == "numbers"
    )
    for response in responses
  ]
  of_responses = [asked[response["question_id"]] for response in responses]
  pairs = [(r["answer"], answer) for r, answer in zip(of_responses, answers, strict=True)]
  grades = math_answers.grade(
    pairs,
    checker=config.checker,
    timeout_seconds=config.timeout_seconds,
    num_processes=config.num_processes,
  )
  context.writer.write_jsonl(
    "grades.jsonl",
    (
      {
        **{name: response[name] for name in _KEPT_IN_GRADES},
        "group": question["group"],
        "num_thinking_tokens": len(response["thinking_tokens"]),
        "answer": answer,
        "vote": None if answer is None else math_answers.normalize(answer),
        "correct": found.correct,
        "status": found.status,
      }
      for response, question, answer, found in zip(
        responses, of_responses, answers, grades, strict=True
      )
    ),
  )
  statuses = collections.Counter(found.status for found in grades)
  return {"statuses": dict(sorted(statuses.items()))}
