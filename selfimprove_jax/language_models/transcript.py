"""Replies of another model, recorded and played again: for tests of what asks models for text."""

import collections
import json
import os
from collections.abc import Iterable, Iterator

from selfimprove_jax import artifacts, storage
from selfimprove_jax.language_models.protocol import LanguageModel, Reply, TextRequest

_SHOWN_CHARACTERS = 200


class NotInTranscriptError(LookupError):
  """A request was never recorded."""


class RecordingModel:
  """A model whose requests and replies are appended to a file, one JSON object a line."""

  def __init__(self, model: LanguageModel, path: str | os.PathLike):
    self.name = model.name
    self._model = model
    self._log = storage.LineLog(storage.path(path))

  def generate(self, requests: Iterable[TextRequest]) -> Iterator[Reply]:
    """The model's replies; each is in the file before it is handed on."""
    taken: collections.deque[TextRequest] = collections.deque()

    def remembered():
      for request in requests:
        taken.append(request)
        yield request

    for reply in self._model.generate(remembered()):
      request = taken.popleft()
      record = {"model": self.name, "request": request.to_json(), "reply": reply.to_json()}
      self._log.write(json.dumps(record) + "\n")
      yield reply

  def close(self) -> None:
    """Closes the file, and the model."""
    self._log.close()
    self._model.close()


class TranscriptModel:
  """Gives the recorded reply to each request: of the same content and the same id."""

  def __init__(self, path: str | os.PathLike):
    """Reads what `RecordingModel` wrote.

    Raises:
      ValueError: the file is empty, or a line in it is no record; its number is named.
    """
    self._path = storage.path(path)
    self._replies: dict[str, Reply] = {}
    for number, line in enumerate(storage.read_lines(self._path), start=1):
      try:
        record = json.loads(line)
        request = TextRequest.from_json(record["request"])
        self._replies[_key(request)] = Reply.from_json(record["reply"])
        self.name = record["model"]
      except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{self._path}, line {number}, is no record: {error}") from None
    if not self._replies:
      raise ValueError(f"{self._path} holds no record")

  def generate(self, requests: Iterable[TextRequest]) -> Iterator[Reply]:
    """The recorded replies.

    Raises:
      NotInTranscriptError: a request was not recorded; the message shows it.
    """
    for request in requests:
      reply = self._replies.get(_key(request))
      if reply is None:
        shown = json.dumps(request.to_json())
        raise NotInTranscriptError(
          f"request {request.id!r} is not in {self._path}: {shown[:_SHOWN_CHARACTERS]}"
        )
      yield reply

  def close(self) -> None:
    pass


def _key(request):
  return artifacts.digest([request.key, request.id])
