"""Checkpoints on this machine's devices as language models."""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from jax.sharding import Mesh

from selfimprove_jax.data.tokenizer import Tokenizer, make_tokenizer
from selfimprove_jax.language_models import structured
from selfimprove_jax.language_models.chat import PLAIN, ChatTemplate, encode_markup
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
from selfimprove_jax.models.checkpoints.tokenizer_files import TokenizerFiles, read_tokenizer
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

  A reply depends on the checkpoint, the request and the seed alone. JSON schemas are
  enforced token by token, so a reply violates them only if it is cut at `max_tokens`. Of choices
  the likeliest is returned.

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
          context, continuation = self.encode_pair(request)
        except ValueError as error:
          taken.append((request, str(error)))
        else:
          taken.append((request, None))
          shared = self._shared(request.context, context, request.shared)
          yield engine_requests.ScoreRequest(
            prompt=context, continuation=continuation, shared=shared
          )

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
    return encode_markup(self.tokenizer, text)

  def _submit(self, request: TextRequest) -> tuple[TextRequest, int, int | Reply]:
    try:
      if request.choices:
        return request, 0, self._choose(request)
      asked = self._engine_request(request)
      return request, len(asked.prompt), self.engine.submit(asked)
    except ValueError as error:
      return request, 0, Reply.failed(request, str(error))

  def _choose(self, request: TextRequest) -> Reply:
    """Returns the choice of the highest probability, whatever the temperature is.

    It is the probability of the whole text and the end that follows it, not normalized by length:
    the first token alone may be likely for another choice.
    """
    prompt = self._encode(request.prompt)
    tokens = [[*self.tokenizer.encode(choice), self.eos_ids[0]] for choice in request.choices]
    scores = list(
      self.engine.score(
        engine_requests.ScoreRequest(prompt=prompt, continuation=ids, shared=[len(prompt)])
        for ids in tokens
      )
    )
    for score in scores:
      if score.error is not None:
        return Reply.failed(request, score.error)
    best = max(range(len(scores)), key=lambda place: scores[place].logprob)
    choice, ids = request.choices[best], tuple(tokens[best][:-1])
    usage = Usage(len(prompt), len(ids))
    return Reply(
      id=request.id, text=choice, finish_reason="stop", usage=usage, parsed=choice, tokens=ids
    )

  def _engine_request(self, request: TextRequest) -> engine_requests.Request:
    prompt = self._encode(request.prompt)
    chat_stops = self.chat.stop_strings if is_chat(request.prompt) else ()
    schema = None if request.json_schema is None else json.dumps(request.json_schema)
    sampling = {f.name: getattr(request, f.name) for f in dataclasses.fields(SamplingConfig)}
    return engine_requests.Request(
      prompt=prompt,
      shared=self._shared(request.prompt, prompt, request.shared),
      max_new_tokens=request.max_tokens,
      min_new_tokens=request.min_tokens,
      seed=self.seed if request.seed is None else request.seed,
      record_id=record_id(request),
      sample=request.sample,
      sampling=SamplingConfig(**sampling),
      stop_ids=tuple(request.stop_ids),
      stop_strings=(*request.stop, *chat_stops),
      top_logprobs=request.top_logprobs,
      grammar=None if schema is None else self._grammar(schema),
    )

  def _encode(self, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
      return [*self.prefix_ids, *self.tokenizer.encode(prompt)]
    if not is_chat(prompt):
      return [int(token) for token in prompt]
    if self.chat is None:
      raise ValueError(
        f"{self.name} has no chat template, and the prompt is messages: give a text, or load the "
        f"model with chat_template={PLAIN!r}"
      )
    return self.chat.render(prompt)

  def _shared(self, prompt: Prompt, ids: Sequence[int], shared: Sequence[int]) -> list[int]:
    """Returns how many of a prompt's tokens belong to each shared part of it."""
    if not isinstance(prompt, str) and not is_chat(prompt):
      return list(shared)
    cut = (_beginning(prompt, end) for end in shared)
    # A token that spans the end of a part is not shared.
    return [num_equal(ids, self._encode(part)) for part in cut if len(part)]

  def encode_pair(self, request: ScoreRequest) -> tuple[list[int], list[int]]:
    """Returns the ids of a context, at least one, and of its continuation."""
    context, continuation = request.context, request.continuation
    ids = self._encode(context)
    if not isinstance(continuation, str):
      rest = [int(token) for token in continuation]
    elif isinstance(context, str):
      # Tokenized alone, a continuation would get other tokens than the same text gets in training.
      whole = self._encode(context + continuation)
      shared = num_equal(ids, whole[:-1])
      ids, rest = whole[:shared], whole[shared:]
    else:
      rest = self.tokenizer.encode(continuation)
    return ids or list(self.prefix_ids or self.eos_ids[:1]), rest

  def _compile(self, schema: str) -> Grammar:
    return self.grammars.json_schema(json.loads(schema))


def load(
  checkpoint: str | os.PathLike | Checkpoint,
  mesh: Mesh | None = None,
  *,
  num_slots: int | None = None,
  max_length: int | None = None,
  compute: ComputeConfig = _AUTO,
  tokenizer: str | os.PathLike | None = None,
  chat_template: str | None = None,
  batch_invariant: bool = True,
  seed: int = 0,
) -> LocalModel:
  """Loads a checkpoint with its tokenizer and chat template.

  Args:
    checkpoint: a path that `open_checkpoint` reads, such as a GGUF file, a Hugging Face folder, or
      `runs/sbp_quick/arms/sbp`; or what it returned.
    mesh: devices and how parameters are sharded; None for all devices, each with all parameters.
    num_slots: completions sampled at once; None for 16, or the next multiple of the data shards.
    max_length: maximum number of tokens of a prompt and its completion; None for the model's
      context, at most 2048.
    tokenizer: a Hugging Face folder with a tokenizer, for a checkpoint that has none or to replace
      its own; None for the checkpoint's own.
    chat_template: Jinja source, or "plain" for a model that never saw a chat, such as a trained
      arm; None for the checkpoint's own.
    batch_invariant: as in `Engine`.
    seed: seed for requests that have none.

  Raises:
    ValueError: there is no such checkpoint, it lacks a tokenizer or an end of sequence, the
      tokenizer has more ids than the model, or `max_length` exceeds its context.
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
  files, tokenizer = _load_tokenizer(checkpoint, tokenizer)
  special = files.special_tokens
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


def _load_tokenizer(
  checkpoint: Checkpoint, folder: str | os.PathLike | None
) -> tuple[TokenizerFiles, Tokenizer]:
  """Returns the tokenizer of a folder, or the checkpoint's own; see `load`."""
  if folder is None:
    files, name = checkpoint.tokenizer_files(), str(checkpoint.path)
  else:
    files = read_tokenizer(pathlib.Path(folder), begins_with_bos=False)
    name = str(folder)
  special = files.special_tokens
  tokenizer = make_tokenizer(files.backend, special, name=name, default=special.get("eos_token"))
  vocab_size = checkpoint.compute_config({}).vocab_size
  if tokenizer.vocab_size > vocab_size:
    raise ValueError(
      f"the tokenizer of {name} has {tokenizer.vocab_size} ids, and the model at "
      f"{checkpoint.path} has {vocab_size}"
    )
  return files, tokenizer


def _beginning(prompt: Prompt, num_chars: int) -> Prompt:
  """Returns the first characters of a text, or of the contents of messages."""
  if isinstance(prompt, str):
    return prompt[:num_chars]
  cut: list[Any] = []
  for message in prompt:
    if num_chars <= 0:
      break
    cut.append({**message, "content": message["content"][:num_chars]})
    num_chars -= len(message["content"])
  return cut


def num_equal(a: Sequence[int], b: Sequence[int]) -> int:
  """Returns the length of the longest common beginning."""
  return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


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
