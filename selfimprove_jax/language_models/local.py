"""Checkpoints on this machine's devices as language models."""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from jax.sharding import Mesh

from selfimprove_jax.data.tokenizer import Tokenizer, make_tokenizer
from selfimprove_jax.language_models import structured
from selfimprove_jax.language_models.chat import ChatTemplate, any_of
from selfimprove_jax.language_models.protocol import (
  Prompt,
  Reply,
  Score,
  ScoreRequest,
  TextRequest,
  TokenLogprob,
  Usage,
  is_chat,
)
from selfimprove_jax.models.checkpoints import Checkpoint, open_checkpoint
from selfimprove_jax.models.llama import Llama, LlamaConfig
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.runtime.config import section
from selfimprove_jax.sampling import requests as engine_requests
from selfimprove_jax.sampling.engine import Engine
from selfimprove_jax.sampling.grammar import Grammar, GrammarCompiler
from selfimprove_jax.sampling.requests import Completion, SamplingConfig

# Requests submitted per slot. Replies leave in order, so without requests waiting in the engine one
# long reply at the head of the line would leave the other slots idle.
_LOOK_AHEAD = 4
_MAX_GRAMMARS = 256
_DEFAULT_SLOTS, _DEFAULT_MAX_LENGTH = 16, 2048


@section
class ComputeConfig:
  """How a stored model is computed.

  Attributes:
    dtype: dtype of parameters, activations and KV cache; "auto" is float32 on CPUs and bfloat16 on
      other devices.
    attention: implementation, as in `LlamaConfig.attention`.
  """

  dtype: Literal["auto", "float32", "bfloat16"] = "auto"
  attention: str = "auto"


_AUTO = ComputeConfig()


@dataclasses.dataclass(eq=False, repr=False)
class LocalModel:
  """A `LanguageModel` on a sampling engine, for one thread at a time.

  A reply depends on the checkpoint, the request and the seed alone. JSON schemas and choices are
  enforced token by token, so a reply violates them only if it is cut at `max_tokens`.

  Attributes:
    engine: a `sampling.engine.Engine`, whose ends of sequence are `eos_ids`; None after `close`.
    config: architecture, and how it is computed.
    tokenizer: the tokenizer; special tokens that the checkpoint lacks are the end of sequence.
    chat: the chat template; None for a model without one.
    eos_ids: token ids that end a text; with a chat template, the end of a turn is one of them.
    prefix_ids: token ids that a text without a chat begins with, such as BOS.
    seed: seed for requests that have none.
    max_length: maximum number of tokens of a prompt and its completion.
  """

  engine: Any
  _: dataclasses.KW_ONLY
  name: str
  config: LlamaConfig
  tokenizer: Tokenizer
  chat: ChatTemplate | None
  eos_ids: tuple[int, ...]
  prefix_ids: tuple[int, ...]
  seed: int = 0

  def __post_init__(self) -> None:
    self.max_length = self.engine.max_length
    self._grammar = functools.lru_cache(_MAX_GRAMMARS)(self._compile)
    self._finished: dict[int, Completion] = {}

  @functools.cached_property
  def grammars(self) -> GrammarCompiler:
    """The compiler of grammars for this tokenizer; building it takes seconds."""
    return GrammarCompiler(self.tokenizer, eos_ids=self.eos_ids, vocab_size=self.config.vocab_size)

  def generate(self, requests: Iterable[TextRequest]) -> Iterator[Reply]:
    """Yields a reply to each request, in order; one that cannot run fails alone."""
    source = iter(requests)
    # (request, prompt length, ticket of the engine, or the reply of a request that was refused)
    pending: collections.deque[tuple[TextRequest, int, int | Reply]] = collections.deque()
    try:
      while True:
        room = _LOOK_AHEAD * self.engine.num_slots - len(pending)
        pending.extend(map(self._submit, itertools.islice(source, room)))
        if not pending:
          return
        request, prompt_tokens, ticket = pending[0]
        if isinstance(ticket, Reply):
          pending.popleft()
          yield ticket
        elif ticket in self._finished:
          pending.popleft()
          yield _reply(request, prompt_tokens, self._finished.pop(ticket))
        else:
          # A step may finish requests of another generator on this engine, so all are kept.
          self._finished.update(self.engine.step())
    finally:
      for _, _, ticket in pending:
        if not isinstance(ticket, Reply) and self._finished.pop(ticket, None) is None:
          self.engine.cancel(ticket)

  def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Score]:
    """Yields the log-likelihood of each continuation, in order; one that is refused fails alone.

    An empty context is the model's prefix, or the end of sequence if it has none.
    """
    # Requests that the engine read ahead, each with the reason why it was not given to the engine.
    taken: collections.deque[tuple[ScoreRequest, str | None]] = collections.deque()

    def pairs() -> Iterator[engine_requests.ScoreRequest]:
      for request in requests:
        try:
          context, continuation = self._encode_pair(request)
        except ValueError as error:
          taken.append((request, str(error)))
        else:
          taken.append((request, None))
          yield engine_requests.ScoreRequest(prompt=context, continuation=continuation)

    def refused() -> Iterator[Score]:
      while taken and taken[0][1] is not None:
        yield Score.failed(*taken.popleft())

    for found in self.engine.score(pairs()):
      yield from refused()
      request, _ = taken.popleft()
      if found.error is not None:
        yield Score.failed(request, found.error)
        continue
      num_tokens = len(found.logprobs)
      yield Score(
        id=request.id, logprob=found.logprob, num_tokens=num_tokens, is_greedy=found.is_greedy
      )
    yield from refused()

  def close(self) -> None:
    """Drops the engine, so that its memory is freed."""
    self.engine = None

  def encode_markup(self, text: str) -> list[int]:
    """Returns the ids of a text in which special tokens are recognized; not for users' texts."""
    backend = self.tokenizer.backend
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    ids: list[int] = []
    position = 0
    for match in any_of(special).finditer(text):
      ids += [*self.tokenizer.encode(text[position : match.start()]), backend.token_to_id(match[0])]
      position = match.end()
    return ids + self.tokenizer.encode(text[position:])

  def _submit(self, request: TextRequest) -> tuple[TextRequest, int, int | Reply]:
    try:
      asked = self._engine_request(request)
      return request, len(asked.prompt), self.engine.submit(asked)
    except ValueError as error:
      return request, 0, Reply.failed(request, str(error))

  def _engine_request(self, request: TextRequest) -> engine_requests.Request:
    prompt = self._encode(request.prompt)
    chat_stops = self.chat.stop_strings if is_chat(request.prompt) else ()
    schema = None if request.json_schema is None else json.dumps(request.json_schema)
    sampling = {f.name: getattr(request, f.name) for f in dataclasses.fields(SamplingConfig)}
    return engine_requests.Request(
      prompt=prompt,
      max_new_tokens=request.max_tokens,
      min_new_tokens=request.min_tokens,
      seed=self.seed if request.seed is None else request.seed,
      record_id=record_id(request),
      sample=request.sample,
      sampling=SamplingConfig(**sampling),
      stop_ids=tuple(request.stop_ids),
      stop_strings=(*request.stop, *chat_stops),
      top_logprobs=request.top_logprobs,
      grammar=self._grammar(schema, tuple(request.choices)),
    )

  def _encode(self, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
      return [*self.prefix_ids, *self.tokenizer.encode(prompt)]
    if not is_chat(prompt):
      return [int(token) for token in prompt]
    if self.chat is None:
      raise ValueError(f"{self.name} has no chat template, and the prompt is messages")
    return self.chat.render(prompt)

  def _encode_pair(self, request: ScoreRequest) -> tuple[list[int], list[int]]:
    """Returns the ids of a context, at least one, and of its continuation."""
    context, continuation = request.context, request.continuation
    ids = self._encode(context)
    if not isinstance(continuation, str):
      rest = [int(token) for token in continuation]
    elif isinstance(context, str):
      # Tokenized alone, a continuation would get other tokens than the same text gets in training.
      whole = self._encode(context + continuation)
      pairs = zip(ids, whole[:-1])
      shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
      ids, rest = whole[:shared], whole[shared:]
    else:
      rest = self.tokenizer.encode(continuation)
    return ids or list(self.prefix_ids or self.eos_ids[:1]), rest

  def _compile(self, schema: str | None, choices: tuple[str, ...]) -> Grammar | None:
    if choices:
      return self.grammars.choices(choices)
    return None if schema is None else self.grammars.json_schema(json.loads(schema))


def load(
  checkpoint: str | os.PathLike | Checkpoint,
  mesh: Mesh | None = None,
  *,
  num_slots: int | None = None,
  max_length: int | None = None,
  compute: ComputeConfig = _AUTO,
  chat_template: str | None = None,
  batch_invariant: bool = True,
  seed: int = 0,
) -> LocalModel:
  """Loads a checkpoint with its tokenizer and chat template.

  Args:
    checkpoint: a path that `open_checkpoint` reads, or what it returned.
    mesh: devices and how parameters are sharded; None for all devices, each with all parameters.
    num_slots: completions sampled at once; None for 16, or the next multiple of the data shards.
    max_length: maximum number of tokens of a prompt and its completion; None for the model's
      context, at most 2048.
    chat_template: Jinja source, or `chat.PLAIN`; None for the checkpoint's own.
    batch_invariant: as in `Engine`.
    seed: seed for requests that have none.

  Raises:
    ValueError: there is no such checkpoint, it lacks a tokenizer or an end of sequence, or
      `max_length` exceeds its context.
  """
  if not isinstance(checkpoint, Checkpoint):
    checkpoint = open_checkpoint(checkpoint)
  mesh = partitioning.MeshConfig().make() if mesh is None else mesh
  if num_slots is None:
    shards = partitioning.num_batch_shards(mesh)
    num_slots = -(-_DEFAULT_SLOTS // shards) * shards
  context = checkpoint.max_positions
  max_length = min(context, _DEFAULT_MAX_LENGTH) if max_length is None else max_length
  if not 2 <= max_length <= context:
    raise ValueError(
      f"max_length={max_length} must be between 2 and {context}, the context of the model at "
      f"{checkpoint.path}"
    )
  files = checkpoint.tokenizer_files()
  special, name = files.special_tokens, str(checkpoint.path)
  tokenizer = make_tokenizer(files.backend, special, name=name, default=special.get("eos_token"))
  chat, eos_ids = None, files.eos_ids or (tokenizer.eos_id,)
  source = files.chat_template if chat_template is None else chat_template
  if source is not None:
    chat = ChatTemplate(tokenizer, source, special_tokens=special, eos_ids=eos_ids)
    eos_ids = chat.stop_ids
  dtype = compute.dtype
  if dtype == "auto":
    dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
  config = checkpoint.compute_config(
    {"dtype": dtype, "param_dtype": dtype, "attention": compute.attention}
  )
  engine = Engine(
    Llama(config),
    checkpoint.load_params(mesh, config),
    mesh,
    eos_ids=eos_ids,
    pad_id=tokenizer.pad_id,
    num_slots=num_slots,
    max_length=max_length,
    decode_text=tokenizer.decode,
    batch_invariant=batch_invariant,
  )
  return LocalModel(
    engine,
    name=checkpoint.path.name,
    config=config,
    tokenizer=tokenizer,
    chat=chat,
    eos_ids=eos_ids,
    prefix_ids=files.prefix_ids,
    seed=seed,
  )


def record_id(request: TextRequest) -> int:
  """Returns the 64 bits that seed a request's random numbers: its own, or a hash of id or content.

  Several samples of one content share them; `sample` distinguishes those.
  """
  if request.record_id is not None:
    return request.record_id
  content = request.id or dataclasses.replace(request, sample=0, seed=None).key
  return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")


def _reply(request: TextRequest, prompt_tokens: int, completion: Completion) -> Reply:
  text = completion.text or ""
  parsed, problem, logprobs = None, completion.error, None
  if completion.finish_reason in ("stop", "length") and structured.schema_of(request) is not None:
    parsed, problem = structured.read(request, text)
  if completion.logprobs is not None:
    tokens = zip(completion.tokens, completion.logprobs, strict=True)
    logprobs = tuple(TokenLogprob(token, found.logprob, found.top) for token, found in tokens)
  return Reply(
    id=request.id,
    text=text,
    finish_reason=completion.finish_reason,
    usage=Usage(prompt_tokens, len(completion.tokens)),
    parsed=parsed,
    error=problem,
    tokens=tuple(completion.tokens),
    logprobs=logprobs,
  )
