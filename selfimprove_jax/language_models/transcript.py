"""Recorded replies and scores of a model, replayed in tests of the code that uses the model."""

import collections
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from selfimprove_jax.language_models.protocol import (
  LanguageModel,
  Reply,
  Score,
  ScoreRequest,
  TextRequest,
)
from selfimprove_jax.runs import artifacts, storage

Q = TypeVar("Q", TextRequest, ScoreRequest)
R = TypeVar("R", Reply, Score)
_SHOWN_CHARACTERS = 200
_logger = logging.getLogger(__name__)


class NotInTranscriptError(LookupError):
  """A request was not recorded."""


class RecordingModel:
  """Passes requests to a model and appends each with its result to a file, one JSON object a line.

  A result is written before it is yielded.
  """

  def __init__(self, model: LanguageModel, path: str | os.PathLike) -> None:
    self.name = model.name
    self._model = model
    path = storage.path(path)
    _cut_torn_line(path)
    self._log = storage.LineLog(path)

  def generate(self, requests: Iterable[TextRequest]) -> Iterator[Reply]:
    """Yields the model's replies."""
    return self._record(requests, self._model.generate, "reply")

  def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Score]:
    """Yields the model's scores."""
    return self._record(requests, self._model.score, "score")

  def _record(
    self, requests: Iterable[Q], ask: Callable[[Iterable[Q]], Iterator[R]], kind: str
  ) -> Iterator[R]:
    taken: collections.deque[Q] = collections.deque()  # read by the model, not answered yet

    def remembered() -> Iterator[Q]:
      for request in requests:
        taken.append(request)
        yield request

    for result in ask(remembered()):
      record = {"model": self.name, "request": taken.popleft().to_json(), kind: result.to_json()}
      self._log.write(json.dumps(record) + "\n")
      yield result

  def close(self) -> None:
    """Closes the file and the model."""
    self._log.close()
    self._model.close()


class TranscriptModel:
  """Replays the recorded result of each request; content and id must match."""

  def __init__(self, path: str | os.PathLike) -> None:
    """Reads a file that `RecordingModel` wrote.

    Raises:
      ValueError: the file is empty, or a line is not a record; its number is named.
    """
    self._path = storage.path(path)
    self._results: dict[str, Reply | Score] = {}
    for number, line in enumerate(storage.read_lines(self._path), start=1):
      if not line.endswith("\n"):
        _logger.warning("%s: the last line is torn, and is left out", self._path)
        break
      try:
        record = json.loads(line)
        if "score" in record:
          request, result = ScoreRequest(**record["request"]), Score.from_json(record["score"])
        else:
          request, result = TextRequest(**record["request"]), Reply.from_json(record["reply"])
        self._results[_key(request)] = result
        self.name = record["model"]
      except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{self._path}, line {number}, is not a record: {error}") from None
    if not self._results:
      raise ValueError(f"{self._path} has no records")

  def generate(self, requests: Iterable[TextRequest]) -> Iterator[Reply]:
    """Yields the recorded replies.

    Raises:
      NotInTranscriptError: a request was not recorded; the message shows it.
    """
    return map(self._find, requests)

  def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Score]:
    """Yields the recorded scores; raises like `generate`."""
    return map(self._find, requests)

  def _find(self, request: TextRequest | ScoreRequest) -> Reply | Score:
    found = self._results.get(_key(request))
    if found is None:
      shown = json.dumps(request.to_json())[:_SHOWN_CHARACTERS]
      raise NotInTranscriptError(f"request {request.id!r} is not in {self._path}: {shown}")
    return found

  def close(self) -> None:
    """Does nothing: the file was read whole."""


def _cut_torn_line(path: storage.Path) -> None:
  """Removes the end of a file that was torn while it was written."""
  if storage.is_remote(path) or not path.exists():
    return
  content = path.read_bytes()
  if whole := content.rpartition(b"\n")[0]:
    whole += b"\n"
  if len(whole) < len(content):
    _logger.warning("%s: the last line is torn, and is removed", path)
    storage.write_atomic(path, whole)


def _key(request: TextRequest | ScoreRequest) -> str:
  return artifacts.digest([request.key, request.id])
