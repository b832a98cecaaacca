"""Runs the examples of a task on a language model, one record per example.

Log-likelihoods are requests (context, continuation) to `LanguageModel.score`. As in lm-eval,
trailing spaces of a context belong to the continuation, an empty context is one prefix token, and a
context that is too long loses its beginning.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from selfimprove_jax.evaluation.tasks.items import Choices, Document, Example, Generation
from selfimprove_jax.language_models.local import LocalModel, num_equal
from selfimprove_jax.language_models.protocol import (
  LanguageModel,
  Reply,
  Score,
  ScoreRequest,
  TextRequest,
)

_SHOWN_CHARS = 500  # of a document, in its record


def run(model: LanguageModel, examples: Sequence[Example]) -> Iterator[dict[str, Any]]:
  """Yields the record of each example, in order.

  A record has `id`, `group`, and `prompts`, and either `choices`, `gold`, `prediction` (the index
  of the likeliest choice), and `logprobs` (in nats), `num_tokens`, and `greedy` of each choice; or
  `answers`, `grader`, `generation` and `finish_reason` (of all samples, if there are several:
  `generations` and `finish_reasons`), and `letters` where one is to be stated; or, for a document,
  the sums over its windows. `truncated` counts the requests whose context was cut.

  Raises:
    ValueError: the model gave no score or no text for an example; names it.
  """
  asked = [_Asked(model, example) for example in examples]
  scores = collections.defaultdict(list)
  for score in model.score(request for one in asked for request in one.scores):
    _check(score.id, score.error)
    if not math.isfinite(score.logprob):
      raise ValueError(f"{score.id}: the log-likelihood is {score.logprob}")
    scores[score.id].append(score)
  replies = collections.defaultdict(list)
  for reply in model.generate(request for one in asked for request in one.texts):
    _check(reply.id, reply.error)
    replies[reply.id].append(reply)
  for one in asked:
    id_ = one.example.id
    yield _record(one, scores[id_], replies[id_])


def _check(id_: str, error: str | None) -> None:
  if error is not None:
    raise ValueError(f"{id_}: {error}")


class _Asked:
  """The requests of one example."""

  def __init__(self, model: LanguageModel, example: Example):
    self.example, self.truncated = example, 0
    self.scores: list[ScoreRequest] = []
    self.texts: list[TextRequest] = []
    # Models elsewhere tokenize, and cut, for themselves.
    self._local = model if isinstance(model, LocalModel) else None
    item = example.item
    if isinstance(item, Choices):
      self.scores = self._choices(item)
    elif isinstance(item, Generation):
      request = self._text(item)
      self.texts = [dataclasses.replace(request, sample=n) for n in range(item.num_samples)]
    else:
      self.scores = list(self._windows(item))

  def _choices(self, item: Choices) -> list[ScoreRequest]:
    """Returns the requests of an item's choices, which share contexts where that saves anything."""
    pairs = item.pairs()
    requests = [self._pair(*pair, item.preamble) for pair in pairs]
    if self._local is None:
      return requests
    inputs = collections.defaultdict(set)
    for (context, _), request in zip(pairs, requests):
      inputs[context].add((*request.context, *request.continuation[:-1]))
    # Requests that differ in their last token only, such as A, B, C and D, are one row anyway.
    return [
      dataclasses.replace(request, shared=[*request.shared, len(request.context)])
      if len(inputs[context]) > 1
      else request
      for (context, _), request in zip(pairs, requests)
    ]

  def _pair(self, context: str, continuation: str, preamble: int) -> ScoreRequest:
    """Returns the request of a choice."""
    kept = context.rstrip()
    pair = kept, context[len(kept) :] + continuation
    request = ScoreRequest(context=pair[0], continuation=pair[1], id=self.example.id)
    if self._local is None:
      return request
    ids, rest = self._local.encode_pair(request) if kept else (self._prefix(), self._ids(pair[1]))
    ids, shared = self._cut(ids, self._local.max_length - len(rest), context[:preamble])
    return ScoreRequest(context=ids, continuation=rest, shared=shared, id=self.example.id)

  def _text(self, item: Generation) -> TextRequest:
    prompt, shared = item.prompt, []
    if self._local is not None:
      ids = [*self._local.prefix_ids, *self._ids(prompt)]
      room = self._local.max_length - item.max_tokens
      prompt, shared = self._cut(ids, room, item.prompt[: item.preamble])
    return TextRequest(
      prompt=prompt,
      shared=shared,
      max_tokens=item.max_tokens,
      temperature=item.temperature,
      stop=item.stop,
      id=self.example.id,
    )

  def _cut(self, ids: list[int], room: int, preamble: str) -> tuple[list[int], list[int]]:
    """Returns the last ids for which there is room, and how many of them the preamble has."""
    if room < 1:
      raise ValueError(
        f"{self.example.id}: the model's window of {self._local.max_length} tokens leaves no room "
        f"for a context"
      )
    self.truncated += len(ids) > room
    if not preamble:
      return ids[-room:], []
    shared = num_equal(ids, [*self._local.prefix_ids, *self._ids(preamble)])
    return ids[-room:], [max(shared - max(len(ids) - room, 0), 0)]

  def _ids(self, text: str) -> list[int]:
    return self._local.tokenizer.encode(text)

  def _prefix(self) -> list[int]:
    """Returns the one token that stands for an empty context: BOS, or the end of sequence."""
    return list(self._local.prefix_ids[-1:]) or [self._local.tokenizer.bos_id]

  def _windows(self, document: Document) -> Iterator[ScoreRequest]:
    """Yields windows that predict each token of a document once.

    The first one begins with the prefix token. Later ones read as many tokens as the model can, of
    which those are predicted that no earlier window has.
    """
    if self._local is None:
      raise ValueError(f"{self.example.id}: whole documents need a model on this machine")
    tokens, prefix = self._ids(document.text), self._prefix()
    size = self._local.max_length - 1  # tokens that a window reads: all but its last
    for begin in range(0, len(tokens), size):
      predicted = tokens[begin : begin + size]
      context = tokens[max(begin + len(predicted) - 1 - size, 0) : begin] if begin else prefix
      yield ScoreRequest(context=context, continuation=predicted, id=self.example.id)


def _record(one: _Asked, scores: Sequence[Score], replies: Sequence[Reply]) -> dict[str, Any]:
  item = one.example.item
  made = {"id": one.example.id, "group": one.example.group, "truncated": one.truncated}
  if isinstance(item, Generation):
    made |= {
      "prompts": [item.prompt],
      "answers": list(item.answers),
      "grader": item.grader,
      "generation": replies[0].text,
      "finish_reason": replies[0].finish_reason,
    }
    if item.letters:
      made["letters"] = item.letters
    if item.num_samples > 1:
      made["generations"] = [reply.text for reply in replies]
      made["finish_reasons"] = [reply.finish_reason for reply in replies]
    return made
  if isinstance(item, Document):
    return {
      **made,
      "prompts": [item.text[:_SHOWN_CHARS]],
      "logprobs": [sum(score.logprob for score in scores)],
      "num_tokens": [sum(score.num_tokens for score in scores)],
      "num_bytes": len(item.text.encode()),
    }
  logprobs = [score.logprob for score in scores]
  return {
    **made,
    "prompts": list(item.contexts),
    "choices": list(item.texts),
    "gold": list(item.gold),
    "prediction": logprobs.index(max(logprobs)),
    "logprobs": logprobs,
    "num_tokens": [score.num_tokens for score in scores],
    "greedy": [score.is_greedy for score in scores],
    "equal_choices": len(item.pairs()) - len(set(item.pairs())),
  }
