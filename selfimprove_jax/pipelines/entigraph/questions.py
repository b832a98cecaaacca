"""Stages that turn the questions about source documents into prompts, closed book and open book."""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field

from selfimprove_jax.evaluation import qa
from selfimprove_jax.language_models.local import ComputeConfig
from selfimprove_jax.pipelines.entigraph.sources import read_documents
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime.config import section
from selfimprove_jax.runtime.partitioning import LocalMeshConfig
from selfimprove_jax.sampling.engine import EngineConfig

Format = Literal["choices", "short_answers", "chain_of_thought"]


@section
class QuestionsConfig:
  """Configures how the questions are asked.

  Attributes:
    formats: "choices" scores the texts of the choices; "short_answers" generates after two shots
      and compares with the accepted forms; "chain_of_thought" is the paper's protocol.
    num_shots: examples before a short answer.
    num_samples: chains of thought per question.
    examples_per_shard: questions per file, which is the unit of resumption.
  """

  formats: Annotated[tuple[Format, ...], Field(min_length=1)] = ("choices", "short_answers")
  num_shots: Annotated[int, Field(ge=0)] = 2
  num_samples: Annotated[int, Field(ge=1)] = 1
  examples_per_shard: Annotated[int, Field(ge=1)] = 100
  mesh: LocalMeshConfig = LocalMeshConfig()
  compute: ComputeConfig = ComputeConfig()
  engine: EngineConfig


@section
class QuestionsStageConfig:
  """Configures the stages `questions/FORMAT` and `open_questions/FORMAT`."""

  format: Format
  num_shots: int
  num_samples: int


def questions(context: Context, config: QuestionsStageConfig) -> dict[str, Any]:
  """Makes the prompts of the test questions in one format; open-book if there are passages.

  Questions about one document are not independent, so it is their group. If there is only one
  document, each question is its own group: errors then say nothing about other documents.

  Raises:
    ValueError: there are fewer than two questions that have what the format needs.
  """
  documents = read_documents(context.inputs["sources"], "test")
  found = None
  if "passages" in context.inputs:
    found = {r["question"]: r["passages"] for r in context.inputs["passages"].records()}
  if config.format == "choices":
    examples = qa.choice_examples(documents, passages=found)
  elif config.format == "short_answers":
    shots = config.num_shots
    examples = qa.short_answer_examples(documents, num_shots=shots, passages=found)
  else:
    samples = config.num_samples
    examples = qa.cot_examples(documents, num_samples=samples, passages=found)
  made = list(examples)
  if len(made) < 2:
    raise ValueError(
      f"the source documents have {len(made)} questions for the format {config.format!r}; a "
      f"standard error needs at least 2. Leave it out of questions.formats"
    )
  if len({example.group for example in made}) == 1:
    made = [dataclasses.replace(example, group=example.id) for example in made]
  context.writer.write_jsonl("examples.jsonl", (example.to_json() for example in made))
  return {"examples": len(made), "groups": len({example.group for example in made})}
