"""Texts that were synthesized elsewhere, as a transcript that units' own requests find.

  synthesizer = Synthesizer(sources, PromptSet.load("default"), generation, "some-model")
  write_transcript(path, read_recorded(folder), synthesizer.make_request, "some-model")
  model = TranscriptModel(path)

A request is found only if its prompt and its sampling are those of the pipeline that replays it, so
a transcript is written again when its prompts change.
"""

import json
import os
import pathlib
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

from selfimprove_jax.data import files
from selfimprove_jax.data.files import CorpusError
from selfimprove_jax.language_models.chat_api import rough_num_tokens
from selfimprove_jax.language_models.protocol import Reply, TextRequest, Usage
from selfimprove_jax.runs import storage
from selfimprove_jax.synthesis import units
from selfimprove_jax.synthesis.units import Unit


def read_recorded(folder: str | os.PathLike) -> Iterator[tuple[Unit, str]]:
  """Yields the units of a document's folder, each with the text of the reply.

  The folder has `document.jsonl` (one record with `id`), and `entigraph.jsonl` or
  `rephrase.jsonl`, or both. A record of the first has `step`: "entities" with `summary` and
  `entities`; after it, "pair" or "triplet" with `entities` and `text`. A record of the second has
  `style`, `sample` and `text`. All have `document`.

  Raises:
    CorpusError: while iterating: a file is missing, or a record is not of this form, is about
      another document or about entities that are not listed, or repeats an earlier one.
  """
  root = pathlib.Path(folder)
  documents = [files.field(record, "id") for _, record in _records(root, "document.jsonl")]
  if len(documents) != 1:
    raise CorpusError(f"{root / 'document.jsonl'}: {len(documents)} records; there must be one")
  names = [name for name in ("entigraph.jsonl", "rephrase.jsonl") if _file(root, name).exists()]
  if not names:
    raise CorpusError(f"{root} has neither entigraph.jsonl nor rephrase.jsonl")
  seen: set[Unit] = set()
  entities: list[str] = []
  for name in names:
    for where, record in _records(root, name):
      try:
        unit, text = _recorded(record, entities)
        if unit.document != documents[0]:
          raise ValueError(f"document is {unit.document!r}; that of the folder is {documents[0]!r}")
        if unit in seen:
          raise ValueError(f"{unit} occurs twice")
      except (ValueError, TypeError, KeyError) as error:
        raise CorpusError(f"{where}: {type(error).__name__}: {error}") from error
      seen.add(unit)
      yield unit, text


def write_transcript(
  path: str | os.PathLike,
  recorded: Iterable[tuple[Unit, str]],
  make_request: Callable[[Unit, int], TextRequest],
  model_name: str,
) -> int:
  """Writes a file for `TranscriptModel` with the first attempt of each unit.

  Tokens are estimated, since those of the model that wrote the texts are not known.

  Args:
    recorded: units and the texts of their replies; JSON where a request has a schema.
    make_request: as in `calls.answer`.

  Returns:
    The number of records.
  """
  number = 0
  with storage.replacing(storage.path(path)) as temporary, temporary.open("w") as file:
    for unit, text in recorded:
      request = make_request(unit, 0)
      prompt = "\n".join(message["content"] for message in request.prompt)
      usage = Usage(rough_num_tokens(prompt), rough_num_tokens(text), estimated=True)
      parsed = None if request.json_schema is None else json.loads(text)
      reply = Reply(id=request.id, text=text, finish_reason="stop", usage=usage, parsed=parsed)
      record = {"model": model_name, "request": request.to_json(), "reply": reply.to_json()}
      file.write(json.dumps(record) + "\n")
      number += 1
  return number


def recorded_ids(path: str | os.PathLike) -> frozenset[str]:
  """Returns the ids of the requests in a transcript, which are those of their units.

  Raises:
    ValueError: a line is not a record.
  """
  ids = set()
  with storage.path(path).open("rb") as file:
    for number, line in enumerate(file, 1):
      if not line.endswith(b"\n"):
        break  # torn
      try:
        ids.add(json.loads(line)["request"]["id"])
      except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}, is not a record: {error}") from None
  return frozenset(ids)


def keep_recorded(units_: Iterable[Unit], ids: Container[str]) -> tuple[list[Unit], int]:
  """Returns the units whose ids a transcript has, and the number of the others."""
  kept, num_others = [], 0
  for unit in units_:
    if unit.id in ids:
      kept.append(unit)
    else:
      num_others += 1
  return kept, num_others


def _recorded(record: Any, entities: list[str]) -> tuple[Unit, str]:
  """Returns the unit and the text of a record; fills `entities` from the record that lists them."""
  document = files.field(record, "document")
  if "style" in record:
    kind = f"rephrase/{files.field(record, 'style')}"
    return Unit(document, kind, sample=record["sample"]), files.field(record, "text")
  kind = files.field(record, "step")
  if kind == units.ENTITIES:
    summary = files.field(record, "summary")
    entities[:] = record["entities"]
    text = json.dumps({"summary": summary, "entities": entities}, ensure_ascii=False)
    return units.entities_unit(document), text
  if unknown := [name for name in record["entities"] if name not in entities]:
    raise ValueError(f"the entity {unknown[0]!r} is not in the list of entities before it")
  key = tuple(sorted(record["entities"], key=entities.index))  # as `relation_units` makes it
  return Unit(document, kind, key, record.get("sample", 0)), files.field(record, "text")


def _file(root: pathlib.Path, name: str) -> pathlib.Path:
  return files.plain_or_compressed(root / name)


def _records(root: pathlib.Path, name: str) -> Iterator[tuple[str, Any]]:
  """Yields the records of a JSON-lines file, each with its place."""
  for line in files.jsonl_lines((str(_file(root, name)),)):
    if isinstance(line, CorpusError):
      raise line
    try:
      yield line.where, line.parsed()
    except (ValueError, RecursionError) as error:
      raise CorpusError(f"{line.where}: {files.fault(error)}") from error
