"""Reads conversations, and splits them into train, validation and test by hash."""

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from selfimprove_jax.data import files, split
from selfimprove_jax.data.files import CorpusError
from selfimprove_jax.language_models.protocol import ROLES
from selfimprove_jax.reasoning.thinking import ThinkingFormat
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime.config import section

Record = dict[str, Any]
"""id, group, split, and messages: role and content, and thinking before the content of a trace."""

REJECTED = "_rejected.jsonl"

_Paths = Annotated[tuple[str, ...], Field(min_length=1)]
_Fraction = Annotated[float, Field(ge=0, lt=1)]


@section
class MessagesConfig:
  """Selects conversations: records with a list of messages, each with `role` and `content`.

  Attributes:
    paths: JSON-lines files (plain, `.gz` or `.zst`), or glob patterns.
    id_field: None makes ids of the form "file:number".
  """

  kind: Literal["messages"] = "messages"
  paths: _Paths
  messages_field: str = "messages"
  id_field: str | None = None


@section
class TracesConfig:
  """Selects questions with a thought and an answer, in three fields (s1; arXiv 2501.19393).

  Attributes:
    paths, id_field: as in `MessagesConfig`.
    thinking: delimiters that the model learns; those that budget forcing is then given.
  """

  kind: Literal["traces"] = "traces"
  paths: _Paths
  question_field: str = "question"
  thinking_field: str = "thinking"
  answer_field: str = "answer"
  id_field: str | None = None
  thinking: ThinkingFormat


SourceConfig = Annotated[MessagesConfig | TracesConfig, Field(discriminator="kind")]


@section
class ConversationsConfig:
  """Selects conversations and sets how many are held out.

  Attributes:
    on_error: "raise" stops at the first bad conversation; "skip" lists it in `_rejected.jsonl`.
    validation_fraction: expected share of the conversations; 0 leaves the split out.
    test_fraction: the same for the test split.
  """

  source: SourceConfig
  on_error: Literal["raise", "skip"] = "raise"
  validation_fraction: _Fraction
  test_fraction: _Fraction

  def __post_init__(self) -> None:
    if self.validation_fraction + self.test_fraction >= 1:
      raise ValueError(
        f"validation_fraction={self.validation_fraction} and test_fraction={self.test_fraction} "
        f"leave nothing to train on; their sum must be below 1"
      )


@section
class ConversationsStageConfig(ConversationsConfig):
  """Configures the stage `conversations`."""

  seed: int


def conversations(context: Context, config: ConversationsStageConfig) -> dict[str, Any]:
  """Reads conversations, drops copies, and assigns each to a split by a hash of its first message.

  Conversations with equal first user messages are one group, which is never divided.

  Raises:
    CorpusError: a record is no conversation, and `on_error` is "raise".
    ValueError: two conversations have one id, or a split is empty.
  """
  counts = {"read": 0, "repeated": 0, **dict.fromkeys(split.SPLITS, 0)}
  rejected: list[dict[str, str]] = []

  def kept() -> Iterator[Record]:
    ids, contents = set(), set()
    for found in _read(config.source):
      if isinstance(found, CorpusError):
        if config.on_error == "raise":
          raise found
        rejected.append({"message": str(found)})
        continue
      counts["read"] += 1
      if found["id"] in ids:
        raise ValueError(f"two conversations have the id {found['id']!r}; ids must be unique")
      ids.add(found["id"])
      content = _hash(json.dumps(found["messages"], sort_keys=True))
      if content in contents:
        counts["repeated"] += 1
        continue
      contents.add(content)
      group = _hash(_opening(found["messages"]))
      record = {**found, "group": group, "split": _split(config, group)}
      counts[record["split"]] += 1
      yield record

  # Each run reads the corpus, since the counts are not in the shard.
  with context.progress.track(None, label=context.name, unit="conversations") as bar:
    records = _tracked(kept(), bar)
    context.writer.write_jsonl("conversations.jsonl", records)
    for _ in records:
      pass
  context.writer.write_jsonl(REJECTED, rejected)
  wanted = {"train": 1.0, "validation": config.validation_fraction, "test": config.test_fraction}
  if empty := [name for name, share in wanted.items() if share and not counts[name]]:
    raise ValueError(
      f"of {counts['read']} conversations ({counts['repeated']} of them copies, {len(rejected)} "
      f"more rejected) none is for {empty[0]}: give more, or change "
      f"validation_fraction={config.validation_fraction} and test_fraction={config.test_fraction}"
    )
  return {
    "conversations": counts["read"],
    "repeated": counts["repeated"],
    "rejected": len(rejected),
    "used": {name: counts[name] for name in split.SPLITS},
  }


def _tracked(records: Iterator[Record], bar: Any) -> Iterator[Record]:
  for record in records:
    yield record
    bar.update(1)


def _read(source: MessagesConfig | TracesConfig) -> Iterator[Record | CorpusError]:
  """Yields {"id", "messages"} of each line, or an error that names the line and the id."""
  for line in files.jsonl_lines(source.paths):
    if isinstance(line, CorpusError):
      yield line
      continue
    where = line.where
    try:
      record = line.parsed()
      id_ = line.id if source.id_field is None else files.field(record, source.id_field)
      where = f"{where} (id {id_!r})"
      make = _trace if isinstance(source, TracesConfig) else _messages
      yield {"id": id_, "messages": make(record, source)}
    except (ValueError, RecursionError) as error:
      yield CorpusError(f"{where}: {files.fault(error)}")


def _messages(record: Any, source: MessagesConfig) -> list[dict[str, str]]:
  """Returns the messages of a record up to the assistant's last one."""
  if not isinstance(record, dict) or not isinstance(record.get(source.messages_field), list):
    raise CorpusError(f"no list {source.messages_field!r} of messages")
  messages = []
  for index, message in enumerate(record[source.messages_field]):
    try:
      role, content = (files.field(message, name) for name in ("role", "content"))
    except ValueError as error:
      raise CorpusError(f"messages[{index}]: {files.fault(error)}") from error
    if role not in ROLES:
      raise CorpusError(f"messages[{index}] has role {role!r}; supported are {', '.join(ROLES)}")
    if role == "assistant" and not content.strip():
      raise CorpusError(f"messages[{index}], of the assistant, is empty")
    messages.append({"role": role, "content": content})
  while messages and messages[-1]["role"] != "assistant":
    messages.pop()  # nothing is learned from what no answer follows
  if not messages:
    raise CorpusError("no message of the assistant")
  if messages[0]["role"] == "assistant":
    raise CorpusError("messages[0] is the assistant's; another message must precede it")
  return messages


def _trace(record: Any, source: TracesConfig) -> list[dict[str, str]]:
  names = (source.question_field, source.thinking_field, source.answer_field)
  values = {name: files.field(record, name) for name in names}
  if empty := [name for name, value in values.items() if not value.strip()]:
    raise CorpusError(f"field {empty[0]!r} is empty")
  question, thinking, answer = values.values()
  return [
    {"role": "user", "content": question},
    {"role": "assistant", "content": answer, "thinking": thinking},
  ]


def _opening(messages: list[dict[str, str]]) -> str:
  """Returns the first message that is not the system's, without its white space."""
  roles = ("system", "developer")
  first = next(message for message in messages if message["role"] not in roles)
  return " ".join(first["content"].split())


def _split(config: ConversationsStageConfig, group: str) -> str:
  unit = int(_hash(f"{config.seed}\0{group}")[:13], 16) / 16**13  # 52 bits: exact in a float
  if unit < config.test_fraction:
    return "test"
  return "validation" if unit < config.test_fraction + config.validation_fraction else "train"


def _hash(text: str) -> str:
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
