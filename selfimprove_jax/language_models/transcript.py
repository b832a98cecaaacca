"""Recorded replies and scores of a model, replayed in tests of the code that uses the model."""

import collections
import difflib
import heapq
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

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
# A request that is not found is compared with the prompts of this many lines, and thoroughly with
# those that begin and end alike the longest.
_MAX_COMPARED, _MAX_DIFFED, _MAX_DIFFED_CHARACTERS = 20_000, 20, 1000
_logger = logging.getLogger(__name__)


class NotInTranscriptError(ValueError):
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
      NotInTranscriptError: a request was not recorded; the message shows it, and in what it differs
        from the nearest recorded one: that of its id, or else that of the most similar prompt.
    """
    return map(self._find, requests)

  def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Score]:
    """Yields the recorded scores; raises like `generate`."""
    return map(self._find, requests)

  def _find(self, request: TextRequest | ScoreRequest) -> Reply | Score:
    found = self._results.get(_key(request))
    if found is None:
      shown = json.dumps(request.to_json())[:_SHOWN_CHARACTERS]
      raise NotInTranscriptError(
        f"request {request.id!r} is not in {self._path}: {shown}\n{_nearest(request, self._path)}"
      )
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


def _nearest(request: TextRequest | ScoreRequest, path: storage.Path) -> str:
  """Returns a sentence about the recorded request that is most like one that was not recorded.

  Reads the file again, since a model that keeps all prompts would need much memory.
  """
  wanted = request.to_json()
  prompt, kind = _prompt_text(wanted), "prompt" if "prompt" in wanted else "context"
  of_id, alike = None, []
  with path.open("rb") as file:
    for number, line in enumerate(file):
      if number >= _MAX_COMPARED or of_id is not None or not line.endswith(b"\n"):
        break
      recorded = json.loads(line)["request"]
      if kind not in recorded:
        continue
      if request.id and recorded["id"] == request.id:
        of_id = recorded
      other = _prompt_text(recorded)
      equal = _num_equal(prompt, other) + _num_equal(prompt[::-1], other[::-1])
      heapq.heappush(alike, (equal - max(len(prompt), len(other)), -number, recorded))
      if len(alike) > _MAX_DIFFED:
        heapq.heappop(alike)
  if of_id is None and not alike:
    return "Requests of its kind were not recorded."
  nearest = of_id or max((one for _, _, one in alike), key=lambda one: _likeness(prompt, one))
  what = "A request with this id" if of_id else f"The nearest request has id {nearest['id']!r}; it"
  differing = [
    _difference(name, str(wanted.get(name)), str(nearest.get(name)))
    for name in sorted(wanted.keys() | nearest.keys())
    if wanted.get(name) != nearest.get(name) and name not in ("id", "record_id", "shared")
  ]
  return f"{what} was recorded with {'; '.join(differing) or 'this content'}."


def _prompt_text(request: dict[str, Any]) -> str:
  """Returns a text by which the prompts of requests, as JSON values, are compared."""
  parts = [request.get("prompt", request.get("context")), request.get("continuation", "")]
  return "\n".join(part if isinstance(part, str) else json.dumps(part) for part in parts)


def _num_equal(a: str, b: str) -> int:
  """Returns the number of characters with which both texts begin, by bisection."""
  low, high = 0, min(len(a), len(b))
  while low < high:
    middle = (low + high + 1) // 2
    if a[low:middle] == b[low:middle]:
      low = middle
    else:
      high = middle - 1
  return low


def _likeness(prompt: str, recorded: dict[str, Any]) -> float:
  """Returns how alike two prompts are around their first difference."""
  other = _prompt_text(recorded)
  begin = max(0, _num_equal(prompt, other) - _MAX_DIFFED_CHARACTERS // 2)
  a, b = (text[begin : begin + _MAX_DIFFED_CHARACTERS] for text in (prompt, other))
  return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def _difference(name: str, wanted: str, recorded: str) -> str:
  """Returns how a recorded field differs from the one that was asked for, near the difference."""
  begin = max(0, _num_equal(wanted, recorded) - _SHOWN_CHARACTERS // 4)
  shown = [repr(text[begin : begin + _SHOWN_CHARACTERS // 2]) for text in (recorded, wanted)]
  return f"{name} {shown[0]} (asked for: {shown[1]})"
