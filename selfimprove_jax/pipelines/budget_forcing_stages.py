"""Stages of the comparison of test-time compute: checkpoint, questions, responses, grades."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from selfimprove_jax import artifacts
from selfimprove_jax.data import corpora
from selfimprove_jax.evaluation import math_answers
from selfimprove_jax.models import pretrained
from selfimprove_jax.pipelines.budget_forcing_model import (
  QuestionModel,
  encode_prompt,
  file_digests,
  load_model,
)
from selfimprove_jax.pipelines.stages import Context
from selfimprove_jax.progress import Bar
from selfimprove_jax.sampling import budget_forcing, length_controls
from selfimprove_jax.sampling import thinking as thinking_lib
from selfimprove_jax.sampling.engine import Engine
from selfimprove_jax.sampling.requests import Completion, Request
from selfimprove_jax.sampling.sampler import SamplingConfig
from selfimprove_jax.training import preemption

ANSWER_FORMATS = {"gsm8k": "####", "plain": None}
"""How a right answer stands in its field -> what it stands behind there; None for nothing."""
BUDGET_FIELDS = ("num_ignored", "min_tokens", "min_unstopped_tokens")
"""Of `Budget`, beside the lengths."""

_KEPT = ("question_id", "sample", "forced", "num_ignored", "sampled_tokens", "error")
_Respond = Callable[[Sequence[thinking_lib.Question]], list[thinking_lib.Response]]


def checkpoint(context: Context, *, path: str) -> dict[str, Any]:
  """Records a checkpoint, whose weights stay where they are.

  Args:
    path: what `models.pretrained` reads: a Hugging Face folder, a GGUF file, an orbax folder.

  Raises:
    ValueError: no model there, or none that we can run.
  """
  config = pretrained.read_config(path, changes={})
  files = file_digests(path)
  context.writer.write_json("files.json", files)
  return {
    "path": path,
    "kind": pretrained.kind(path),
    "model": dataclasses.asdict(config),
    "num_parameters": config.num_parameters,
    "max_positions": pretrained.read_max_positions(path),
    "files_digest": artifacts.digest(files),
  }


def questions(
  context: Context,
  *,
  path: str,
  question_field: str,
  answer_field: str,
  answer_format: str,
  id_field: str | None,
  num_questions: int,
) -> dict[str, Any]:
  """Takes the first questions of a JSON-lines file (plain, .gz or .zst), with their right answers.

  Args:
    id_field: None for ids made of file and line.
    num_questions: as many, or all there are.

  Raises:
    ValueError: no such file, a record lacks a field, or a right answer is not in its format; or
      there are fewer than two questions, or two of one id.
  """
  mark = ANSWER_FORMATS[answer_format]
  asked, right = (
    corpora.jsonl(path, text_field=field, id_field=id_field)
    for field in (question_field, answer_field)
  )
  records = {}
  for question, answer in zip(asked, right, strict=True):
    if len(records) == num_questions:
      break
    if question.id in records:
      raise ValueError(f"two questions of {path} have the id {question.id!r}; each needs its own")
    gold = answer.text
    if mark is not None:
      gold, found = answer.text.rpartition(mark)[2], mark in answer.text
      if not found:
        raise ValueError(f"the answer of {question.id!r} has no {mark!r}: {answer.text[-80:]!r}")
    records[question.id] = {"question": question.text.strip(), "answer": gold.strip()}
  if len(records) < 2:
    raise ValueError(f"{path} has {len(records)} questions; a standard error needs at least 2")
  context.writer.write_jsonl(
    "questions.jsonl", ({"id": id_, **record} for id_, record in records.items())
  )
  return {"questions": len(records)}


def respond(
  context: Context,
  *,
  mesh: dict[str, int],
  compute: dict[str, Any],
  engine: dict[str, Any],
  prompt: dict[str, Any],
  thinking: dict[str, Any],
  max_answer_tokens: int,
  questions_per_shard: int,
  arm: dict[str, Any],
  seed: int,
) -> dict[str, Any]:
  """Answers every question in one setting.

  A shard of questions is the unit of resumption. A response depends on its question, its number and
  `seed` alone.

  Args:
    compute, engine: see `load_model`.
    prompt: see `encode_prompt`.
    thinking: fields of `ThinkingFormat`.
    arm: `condition`, `sampling`, `num_samples`, `max_tries` (0, or as many for rejection sampling),
      and the fields of `Budget`, with `max_tokens` a number or "auto".

  Raises:
    ValueError: a prompt with its thinking and answer does not fit the engine's window.
    artifacts.ArtifactError: the checkpoint's files are not those that were recorded.
    preemption.Preempted: SIGTERM came; the shards so far are kept.
  """
  records = list(context.inputs["questions"].records())

  @functools.cache  # not made where every shard is there already
  def prepare() -> tuple[list[thinking_lib.Question], _Respond]:
    model = load_model(
      context.inputs["checkpoint"], mesh=mesh, compute=compute, engine=engine, chat=prompt["chat"]
    )
    asked = [
      thinking_lib.Question(
        record["id"], encode_prompt(model, record["question"], arm["condition"], **prompt)
      )
      for record in records
    ]
    format = thinking_lib.ThinkingFormat(**thinking | {"stop": tuple(thinking["stop"])})
    return asked, _responder(
      model,
      asked,
      thinking_lib.tokenize(format, model.encode_markup),
      arm,
      max_answer_tokens=max_answer_tokens,
      engine=engine,
      seed=seed,
      bar=bar,
    )

  def responses(numbers: range) -> Iterator[dict[str, Any]]:
    asked, respond_to = prepare()
    yield from map(dataclasses.asdict, respond_to([asked[number] for number in numbers]))

  counts: collections.Counter[str] = collections.Counter()
  num_shards = math.ceil(len(records) / questions_per_shard)
  with context.progress.track(None, label=context.name, unit="tokens") as bar:
    for shard in range(num_shards):
      name = artifacts.shard_name(shard, num_shards)
      first = shard * questions_per_shard
      numbers = range(first, min(first + questions_per_shard, len(records)))
      context.writer.write_jsonl(name, responses(numbers))
      for response in context.writer.read_jsonl(name):
        counts["responses"] += 1
        counts["tokens"] += response["sampled_tokens"]
        counts["failed"] += response["error"] is not None
      if preemption.requested(shard):
        raise preemption.Preempted(
          f"{context.name}: stopped after shard {shard + 1} of {num_shards}"
        )
  return dict(counts)


def _responder(
  model: QuestionModel,
  asked: Sequence[thinking_lib.Question],
  tokens: thinking_lib.ThinkingTokens,
  arm: dict[str, Any],
  *,
  max_answer_tokens: int,
  engine: dict[str, Any],
  seed: int,
  bar: Bar,
) -> _Respond:
  """What answers questions in the setting of an arm."""
  common = {
    "generate": functools.partial(_generate, model.loaded.engine, bar),
    "tokens": tokens,
    "sampling": SamplingConfig(**arm["sampling"]),
    "seed": seed,
    "decode": model.tokenizer.decode,
  }
  max_tokens = budget_forcing.fit_max_tokens(
    arm["max_tokens"],
    asked,
    tokens,
    max_answer_tokens=max_answer_tokens,
    window=engine["max_length"],
  )
  lengths = {"max_tokens": max_tokens, "max_answer_tokens": max_answer_tokens}
  if arm["max_tries"]:
    return functools.partial(
      length_controls.think_within,
      max_tries=arm["max_tries"],
      num_slots=engine["num_slots"],
      **lengths,
      **common,
    )
  budget = budget_forcing.Budget(**lengths, **{name: arm[name] for name in BUDGET_FIELDS})
  return functools.partial(
    budget_forcing.think_and_answer, budget=budget, num_samples=arm["num_samples"], **common
  )


def _generate(engine: Engine, bar: Bar, requests: Sequence[Request]) -> list[Completion]:
  """`engine.generate`, with a bar that moves."""
  made: dict[int, Completion] = {}
  for index, completion in engine.stream(requests):
    made[index] = completion
    bar.update(len(completion.tokens))
  return [made[index] for index in range(len(requests))]


def grade(
  context: Context, *, checker: str, timeout_seconds: float, num_processes: int
) -> dict[str, Any]:
  """Finds the answer in each response and compares it with the right one.

  Args:
    checker: "math_verify", or "numbers" where every right answer is one; see `math_answers`.
  """
  golds = {record["id"]: record["answer"] for record in context.inputs["questions"].records()}
  responses = list(context.inputs["responses"].records())
  answers = [
    math_answers.extract_answer(
      response["answer_start"] + response["answer"], numbers_only=checker == "numbers"
    )
    for response in responses
  ]
  grades = math_answers.grade(
    [(golds[r["question_id"]], answer) for r, answer in zip(responses, answers, strict=True)],
    checker=checker,
    timeout_seconds=timeout_seconds,
    num_processes=num_processes,
  )
  context.writer.write_jsonl(
    "grades.jsonl",
    (
      {
        **{name: response[name] for name in _KEPT},
        "num_thinking_tokens": len(response["thinking_tokens"]),
        "answer": answer,
        "vote": None if answer is None else math_answers.normalize(answer),
        "correct": found.correct,
        "status": found.status,
      }
      for response, answer, found in zip(responses, answers, grades, strict=True)
    ),
  )
  statuses = collections.Counter(found.status for found in grades)
  return {"statuses": dict(sorted(statuses.items()))}
