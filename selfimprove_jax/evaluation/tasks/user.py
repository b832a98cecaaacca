"""Tasks that a user defines: a JSON-lines file, and a YAML file that says what its fields are."""

import functools
import hashlib
import pathlib
from typing import Annotated, Any

import jinja2
import jinja2.meta
import yaml
from pydantic import Field

from selfimprove_jax.evaluation.tasks.items import Choices, Document, Generation, Grader, Item
from selfimprove_jax.evaluation.tasks.metrics import METRICS
from selfimprove_jax.evaluation.tasks.task import Row, Task
from selfimprove_jax.runtime.config import choices, parse, section


@section
class UserTask:
  """The values of a task's YAML file.

  Exactly one of `choices`, `answers` and `text` is given. `choices`, `gold`, `answers` and `text`
  are names of fields.

  Attributes:
    task: name.
    version: raise it when the prompt changes.
    file: JSON lines (plain or .gz) in the data folder.
    prompt: Jinja template over the fields of a record; it ends where the answer begins, without a
      space.
    choices: a list of texts that are scored, each after a space.
    gold: the right choice: its index, from 0, or its text.
    answers: a text that is accepted as an answer, or a list of them; the model generates one.
    text: a document, which is scored whole.
    stop: strings that end a generated answer.
    grader: how it is compared: as "words", "numbers" or "math".
    group_field: what questions that are alike share.
  """

  task: Annotated[str, Field(pattern="^[A-Za-z0-9_.-]+$")]
  version: int = 1
  file: str
  prompt: str = ""
  choices: str | None = None
  gold: str | None = None
  answers: str | None = None
  text: str | None = None
  stop: tuple[str, ...] = ("\n",)
  max_tokens: Annotated[int, Field(ge=1)] = 64
  grader: Grader = "words"
  metrics: Annotated[tuple[str, ...], Field(min_length=1)]
  shots_file: str | None = None
  num_shots: Annotated[int, Field(ge=0)] = 0
  group_field: str | None = None

  def __post_init__(self) -> None:
    kinds = ("choices", "answers", "text")
    if len(given := [kind for kind in kinds if getattr(self, kind)]) != 1:
      raise ValueError(f"{given or 'none'} of {', '.join(kinds)} is given; exactly one must be")
    if self.choices and not self.gold:
      raise ValueError("choices are given without gold, the field of the right one")
    if not self.text and not self.prompt:
      raise ValueError("prompt is empty; it is what the model reads before the answer")
    if self.prompt != self.prompt.rstrip(" "):
      raise ValueError("prompt ends with a space, which belongs to the answer")
    if self.num_shots and not self.shots_file:
      raise ValueError(f"num_shots={self.num_shots} needs a shots_file; it may be the file itself")
    for name in self.metrics:
      if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}{choices(name, METRICS)}")


def load(path: str) -> Task:
  """Reads the task that a YAML file defines.

  Raises:
    ValueError: there is no such file, or it is not a task's; names the field.
  """
  try:
    content = pathlib.Path(path).read_bytes()
    values = yaml.safe_load(content)
  except (OSError, yaml.YAMLError) as error:
    raise ValueError(f"the task {path}: {error}") from error
  if not isinstance(values, dict):
    raise ValueError(f"the task {path} holds {values!r}; it must have task, file, metrics, ...")
  lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
  environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
  try:
    config = parse(UserTask, values | lists)
    template = environment.from_string(config.prompt)
  except (ValueError, jinja2.TemplateError) as error:
    raise ValueError(f"the task {path}: {error}") from error
  used = jinja2.meta.find_undeclared_variables(environment.parse(config.prompt))
  named = [config.choices, config.gold, config.answers, config.text, config.group_field]
  return Task(
    name=config.task,
    version=config.version,
    definition=hashlib.sha256(content).hexdigest()[:16],
    file=config.file,
    fields=tuple(dict.fromkeys([*sorted(used), *(name for name in named if name)])),
    make=functools.partial(_item, config, template),
    metrics=config.metrics,
    shots_file=config.shots_file,
    num_shots=config.num_shots,
    group_field=config.group_field,
  )


def _item(config: UserTask, template: Any, record: Row) -> Item:
  if config.text:
    return Document(text=record[config.text])
  prompt = template.render(record)
  if config.choices:
    texts = tuple(record[config.choices])
    return Choices(
      contexts=(prompt,),
      continuations=tuple(" " + text for text in texts),
      texts=texts,
      gold=(_gold(config.gold, record[config.gold], texts),),
    )
  answers = record[config.answers]
  answers = (answers,) if isinstance(answers, str) else tuple(answers)
  return Generation(
    prompt=prompt,
    stop=config.stop,
    max_tokens=config.max_tokens,
    answers=answers,
    shown=answers[0] if answers else "",
    grader=config.grader,
  )


def _gold(name: str, value: Any, texts: tuple[str, ...]) -> int:
  if isinstance(value, str) and value in texts:
    return texts.index(value)
  if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(texts):
    raise ValueError(
      f"{name} is {value!r}; it must be the text of a choice, or its index from 0 to "
      f"{len(texts) - 1}"
    )
  return value
