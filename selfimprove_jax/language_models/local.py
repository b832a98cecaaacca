"""A checkpoint on this machine's devices as a language model, by the sampling engine."""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jax.sharding import Mesh

from selfimprove_jax.language_models import structured
from selfimprove_jax.language_models.protocol import Reply, TextRequest, Usage
from selfimprove_jax.sampling.chat import ChatTemplate
from selfimprove_jax.sampling.chat_files import ChatFiles
from selfimprove_jax.sampling.grammar import Grammar, GrammarCompiler
from selfimprove_jax.sampling.loading import load_model
from selfimprove_jax.sampling.requests import Completion, Request
from selfimprove_jax.sampling.sampler import SamplingConfig

# Requests under way for each slot: slots are refilled at once, also behind one slow reply.
_LOOK_AHEAD = 4
_MAX_GRAMMARS = 256


class LocalModel:
  """A `LanguageModel` on an engine, used by one thread at a time.

  A reply depends on the checkpoint, the request and the seed alone. Its random numbers are made of
  the request's id; of its content where it has none. Schemas and choices are enforced token by
  token, so a reply breaks them only where it is cut at its length.
  """

  def __init__(
    self,
    engine: Any,
    *,
    name: str,
    files: ChatFiles,
    template: ChatTemplate | None,
    make_grammars: Callable[[], GrammarCompiler],
    seed: int = 0,
  ):
    """Args:
    engine: a `sampling.engine.Engine` of this model.
    template: None for a model that has none: messages are refused then.
    make_grammars: called when the first schema is asked for, since it takes seconds.
    seed: of requests that name none.
    """
    self.name = name
    self._engine = engine
    self._files = files
    self._template = template
    self._seed = seed
    self._grammars = functools.cache(make_grammars)
    self._grammar = functools.lru_cache(_MAX_GRAMMARS)(self._compile)
    self._ended: dict[int, Completion] = {}

  def generate(self, requests: Iterable[TextRequest]) -> Iterator[Reply]:
    """A reply for each request, in their order; one that cannot run has failed alone."""
    left = iter(requests)
    # Each with the length of its prompt, and its ticket; or with the reply that it has already.
    pending: collections.deque[tuple[TextRequest, int, int | Reply]] = collections.deque()
    exhausted = False
    try:
      while True:
        while not exhausted and len(pending) < _LOOK_AHEAD * self._engine.num_slots:
          request = next(left, None)
          if request is None:
            exhausted = True
          else:
            pending.append(self._submit(request))
        if not pending:
          return
        request, prompt_tokens, ticket = pending[0]
        if isinstance(ticket, Reply):
          pending.popleft()
          yield ticket
        elif ticket in self._ended:
          pending.popleft()
          yield _reply(request, prompt_tokens, self._ended.pop(ticket))
        else:
          self._ended.update(self._engine.step())
    finally:
      for _, _, ticket in pending:
        if not isinstance(ticket, Reply) and self._ended.pop(ticket, None) is None:
          self._engine.cancel(ticket)

  def close(self) -> None:
    """Forgets the engine, so that its memory is free when nobody else holds it."""
    self._engine = None

  def _submit(self, request):
    try:
      asked = self._engine_request(request)
      return request, len(asked.prompt), self._engine.submit(asked)
    except ValueError as error:
      return request, 0, Reply.failed(request, str(error))

  def _engine_request(self, request):
    if isinstance(request.prompt, str):
      prompt = [*self._files.prefix_ids, *self._files.tokenizer.encode(request.prompt)]
      stop_ids, stop_strings = (), ()
    elif self._template is None:
      raise ValueError(f"{self.name} has no chat template, and the prompt is messages")
    else:
      prompt = self._template.render(request.prompt)
      stop_ids, stop_strings = self._template.stop_ids, self._template.stop_strings
    schema = None if request.json_schema is None else json.dumps(request.json_schema)
    return Request(
      prompt=prompt,
      max_new_tokens=request.max_tokens,
      seed=self._seed if request.seed is None else request.seed,
      record_id=record_id(request),
      sample=request.sample,
      sampling=SamplingConfig(temperature=request.temperature, top_p=request.top_p),
      stop_ids=stop_ids,
      stop_strings=(*request.stop, *stop_strings),
      grammar=self._grammar(schema, tuple(request.choices)),
    )

  def _compile(self, schema: str | None, choices: tuple[str, ...]) -> Grammar | None:
    if choices:
      return self._grammars().choices(choices)
    return None if schema is None else self._grammars().json_schema(json.loads(schema))


def load(
  checkpoint: str | os.PathLike,
  mesh: Mesh,
  *,
  num_slots: int,
  max_length: int,
  changes: dict[str, Any],
  template: str | None = None,
  seed: int = 0,
) -> LocalModel:
  """The model at a path, with its tokenizer and chat template.

  Args:
    checkpoint: what `models.pretrained` reads.
    num_slots: completions sampled at once.
    max_length: the most tokens of a prompt with its completion.
    changes: of `pretrained.read_config`.
    template: instead of the model's own chat template, of `sampling.chat`.
    seed: of requests that name none.

  Raises:
    ValueError: of `load_model`.
  """
  loaded = load_model(
    checkpoint,
    mesh,
    num_slots=num_slots,
    max_length=max_length,
    changes=changes,
    chat_template=template,
  )
  return LocalModel(
    loaded.engine,
    name=pathlib.Path(checkpoint).name,
    files=loaded.files,
    template=loaded.chat,
    make_grammars=lambda: loaded.grammars,
    seed=seed,
  )


def record_id(request: TextRequest) -> int:
  """What tells the request's random numbers from another's: 64 bits of its id, or its content.

  Requests for several samples of one content share it, as `sample` tells them apart.
  """
  content = request.id or dataclasses.replace(request, sample=0, seed=None).key
  return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")


def _reply(request, prompt_tokens, completion):
  text = completion.text or ""
  parsed, problem = None, completion.error
  if completion.finish_reason in ("stop", "length") and structured.schema_of(request) is not None:
    parsed, problem = structured.read(request, text)
  return Reply(
    id=request.id,
    text=text,
    finish_reason=completion.finish_reason,
    usage=Usage(prompt_tokens, len(completion.tokens)),
    parsed=parsed,
    error=problem,
  )
