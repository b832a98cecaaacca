"""Continuous batching: a fixed number of slots, each refilled as soon as its completion ends.

Two jitted programs do the work (`decode.py`): `admit` prefills prompts of one bucket of lengths and
writes them to slots, `draw` draws up to `STEPS_PER_CALL` tokens in all slots. How often they are
compiled depends on the buckets and on the features that requests use, not on the lengths of the
requests.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jax.sharding import Mesh
from pydantic import Field

from selfimprove_jax.models import decode_layout, llama
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.runtime.config import section
from selfimprove_jax.sampling import decode, sampler
from selfimprove_jax.sampling.prefixes import Chain, Prefixes, bucket, num_in
from selfimprove_jax.sampling.requests import (
  MAX_STOP_IDS,
  MAX_TOP_LOGPROBS,
  Completion,
  ContinuationScore,
  Request,
  SamplingConfig,
  ScoreRequest,
  TokenLogprobs,
  Update,
)
from selfimprove_jax.sampling.running import DecodeText, OnUpdate, Running, check_request
from selfimprove_jax.sampling.scoring import Scorer

_LEAST_CACHE = 256
_STREAM_STEPS = 4
# The cache of shared parts may take half of the slots' memory, and what is scored behind them at
# once a quarter.
_SLOTS_PER_PREFIX = 2
_SLOTS_PER_SCORED_PREFIX = 4
_NEVER = np.iinfo(np.int32).max

# The chain that a prompt shares, and the rest of it without its last token.
_Prompt = tuple[Chain, tuple[int, ...]]


@section
class EngineConfig:
  """Size of an engine, for pipelines.

  Attributes:
    num_slots: completions sampled at once.
    max_length: maximum tokens of prompt and completion together.
  """

  num_slots: Annotated[int, Field(ge=1)] = 16
  max_length: Annotated[int, Field(ge=2)] = 2048


class Engine:
  """Samples completions and scores continuations with one set of parameters. Not thread-safe.

  A completion depends only on the parameters and its request. With `batch_invariant` this holds to
  the bit, for a given number of slots and hardware, because each program has the same shapes for
  any load. Without it, shapes follow the load, and a token may differ where two are equally likely
  to within rounding.
  """

  def __init__(
    self,
    model: llama.Llama,
    params: Any,
    mesh: Mesh,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    num_slots: int,
    max_length: int,
    decode_text: DecodeText | None = None,
    prompt_buckets: Sequence[int] | None = None,
    batch_invariant: bool = True,
  ):
    """Args:
      params: parameters of `model`, on the mesh. The engine makes a copy of them in the layout of
        `decode_layout`, in `model.c.dtype`.
      eos_ids: tokens that end a completion.
      num_slots: completions sampled at once.
      max_length: maximum tokens of prompt and completion; the KV cache holds this for each slot.
      decode_text: token ids to text without special tokens; needed for text and stop strings.
      prompt_buckets: prompt lengths to compile for; powers of two if None.
      batch_invariant: False (for servers) pads fewer prompts, and lets the cache grow and shrink.

    Raises:
      ValueError: the slots do not divide over the mesh, or `max_length` is less than 2.
    """
    if max_length < 2:
      raise ValueError(f"max_length={max_length} must be at least 2: a prompt and a new token")
    partitioning.check_batch(num_slots, mesh)
    self.num_slots, self.max_length = num_slots, max_length
    self._eos_ids, self._pad_id = tuple(eos_ids), pad_id
    self._decode_text = decode_text
    self._batch_invariant = batch_invariant
    self._new_rows = functools.partial(new_rows, eos_ids=self._eos_ids, pad_id=pad_id)
    self._prefill_rows = functools.partial(
      decode.prefill_rows, num_slots=num_slots, mesh=mesh, is_padded=batch_invariant
    )
    # A prompt is prefilled without its last token: decoding begins with that one.
    longest = max_length - 1
    powers = [1 << n for n in range(4, longest.bit_length() + 1)]
    self._buckets = _buckets(prompt_buckets or powers, longest)
    self._mesh = mesh
    self._c = decode_layout.decode_config(model.c)
    self._params = decode_layout.decode_params(params, model.c, mesh)
    self._programs = decode.make_programs(self._c, mesh)
    held = max(num_slots // _SLOTS_PER_PREFIX, 1) * max_length
    self._prefixes = Prefixes(
      self._c, self._params, mesh, num_positions=held, max_length=max_length
    )
    self._scorer = Scorer(
      self._c,
      self._params,
      mesh,
      prefixes=self._prefixes,
      # Short rows are packed, so finer lengths would only compile more programs. A long row has a
      # call of its own on a CPU.
      buckets=_buckets(
        [
          length
          for power in powers
          if power >= 64
          for length in ((power, power * 3 // 2) if power >= 512 else (power,))
        ],
        longest,
      ),
      most_positions=num_slots * max_length // _SLOTS_PER_SCORED_PREFIX,
    )
    self._cache_length = max_length if batch_invariant else min(_LEAST_CACHE, max_length)
    with jax.set_mesh(mesh):
      self._rows, self._cache = self._programs.make(
        self._new_rows([], num_slots), length=self._cache_length
      )
    self._running: list[Running | None] = [None] * num_slots
    self._waiting: collections.deque[tuple[int, Request, OnUpdate | None]] = collections.deque()
    self._next_ticket = 0
    self._ended: list[tuple[int, Completion]] = []
    self._counts: collections.Counter[str] = collections.Counter()

  @property
  def num_compilations(self) -> int:
    """Number of programs for prompts, new tokens and scores compiled for this config and mesh."""
    programs = self._programs
    parts = self._scorer.num_compilations, self._prefixes.num_compilations
    return programs.admit._cache_size() + programs.draw._cache_size() + sum(parts)

  @property
  def num_running(self) -> int:
    return sum(running is not None for running in self._running)

  @property
  def num_waiting(self) -> int:
    return len(self._waiting)

  def stats(self) -> dict[str, int]:
    """Returns counts since the engine was made: tokens, requests, calls, and ends by reason.

    `prefilled_tokens` counts each shared part once for as long as it is kept, and leaves out what
    is scored behind it, the `scored_tokens`.
    """
    counts = collections.Counter(self._counts)
    counts["prefilled_tokens"] += self._prefixes.prefilled_tokens
    counts["scored_tokens"] = self._scorer.scored_tokens
    return dict(counts)

  def generate(self, requests: Sequence[Request]) -> list[Completion]:
    """Returns one completion for each request, in order; see `stream`."""
    completions = dict(self.stream(requests))
    return [completions[index] for index in range(len(requests))]

  def stream(
    self,
    requests: Iterable[Request],
    *,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
  ) -> Iterator[tuple[int, Completion]]:
    """Yields (index of the request, completion) as completions end.

    Requests are read lazily, as slots become free, so there may be any number of them. A request
    that can never run yields a completion whose `finish_reason` is `error`. Closing the iterator
    cancels what is unfinished.

    Args:
      on_tokens: called after each step with the number of tokens drawn.
    """
    source = enumerate(requests)
    places: dict[int, int] = {}
    try:
      while True:
        exhausted = False
        # One waiting request per slot: all slots may end at once, and are then refilled at once.
        while len(self._waiting) < self.num_slots:
          try:
            place, request = next(source)
          except StopIteration:
            exhausted = True
            break
          try:
            places[self.submit(request)] = place
          except ValueError as error:
            self._counts["error"] += 1
            yield place, Completion([], "error", error=str(error))
        if exhausted and not places:
          return
        before = self._counts["new_tokens"]
        for ticket, completion in self.step():
          yield places.pop(ticket), completion
        on_tokens(self._counts["new_tokens"] - before)
    finally:
      for ticket in places:
        self.cancel(ticket)

  def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ContinuationScore]:
    """Yields the log-likelihood of each continuation, in order.

    Requests are read lazily, up to 1024 ahead. A request that cannot be scored yields a score with
    its `error`. May be called while completions are running.
    """
    return self._scorer.score(requests)

  def submit(self, request: Request, on_update: OnUpdate | None = None) -> int:
    """Puts a request in the queue; returns its ticket, by which `step` reports its end.

    Args:
      on_update: called by `step` with new tokens of the request, and with its end.

    Raises:
      ValueError: the request can never run.
    """
    check_request(
      request,
      max_length=self.max_length,
      vocab_size=self._c.vocab_size,
      has_tokenizer=self._decode_text is not None,
    )
    ticket = self._next_ticket
    self._next_ticket += 1
    self._waiting.append((ticket, request, on_update))
    self._counts["requests"] += 1
    return ticket

  def cancel(self, ticket: int) -> None:
    """Ends a request without a completion; does nothing if it has ended already."""
    num_waiting = len(self._waiting)
    self._waiting = collections.deque(item for item in self._waiting if item[0] != ticket)
    self._counts["cancelled"] += num_waiting - len(self._waiting)
    for slot, running in enumerate(self._running):
      if running is not None and running.ticket == ticket:
        running.cancel()
        self._free([slot])

  def step(self) -> list[tuple[int, Completion]]:
    """Fills free slots and draws tokens in all; returns (ticket, completion) of what ended."""
    self._fill_slots()
    if self.num_running:
      self._draw_tokens()
    ended, self._ended = self._ended, []
    return ended

  def _fill_slots(self) -> None:
    free = [slot for slot, running in enumerate(self._running) if running is None]
    by_shape = collections.defaultdict(list)
    while free and self._waiting:
      ticket, request, on_update = self._waiting.popleft()
      try:
        running = Running(
          request,
          ticket,
          eos_ids=self._eos_ids,
          limit=min(request.max_new_tokens, self.max_length - len(request.prompt)),
          decode_text=self._decode_text,
          on_update=on_update,
        )
        self._new_rows([running], 1)  # a value that no row can hold fails here, alone
      except Exception as error:
        self._refuse(ticket, on_update, error)
        continue
      slot = free.pop(0)
      self._running[slot] = running
      by_shape[self._shape(request)].append((slot, running))
    for shape, admissions in sorted(by_shape.items()):
      for group in self._groups(shape, admissions):
        self._admit_group(shape, *group)

  def _shape(self, request: Request) -> tuple[int, int]:
    """Returns the length of a request's prefill, and the positions that it may look at.

    The length is 0 without a prefill, for a prompt of one token; the span is 0 without prefixes.
    """
    chain = self._prefixes.chain(request.prompt, request.shared)
    prefilled = len(request.prompt) - 1 - num_in(chain)
    if chain:
      return bucket(prefilled), self._prefixes.span(chain, prefilled)
    return next(b for b in (0, *self._buckets) if b >= prefilled), 0

  def _refuse(self, ticket: int, on_update: OnUpdate | None, error: Exception) -> None:
    """Ends a request that cannot be given to a slot."""
    text = "" if self._decode_text else None
    completion = Completion([], "error", text=text, error=f"{type(error).__name__}: {error}")
    self._counts["error"] += 1
    self._ended.append((ticket, completion))
    if on_update:
      on_update(Update([], text, None, completion))

  def _groups(
    self, shape: tuple[int, int], admissions: Sequence[tuple[int, Running]]
  ) -> Iterator[tuple[list[_Prompt], list[tuple[int, Running]], list[int]]]:
    """Yields (distinct prompts, admissions, each one's index in the prompts) for one prefill."""
    length, span = shape
    if not length:
      yield [], list(admissions), []
      return
    most = self._prefill_rows(length)
    if span:
      # However short these chains are, so that they never push out all longer ones.
      most = min(most, self._prefixes.most_held(self.max_length))
    prompts: dict[_Prompt, int] = {}
    group, sources = [], []
    # Samples of one prompt come one after another, so they meet here and share its prefill.
    for slot, running in admissions:
      request = running.request
      chain = self._prefixes.chain(request.prompt, request.shared)
      prompt = chain, tuple(request.prompt[num_in(chain) : -1])
      if prompt not in prompts and len(prompts) == most:
        yield list(prompts), group, sources
        prompts, group, sources = {}, [], []
      sources.append(prompts.setdefault(prompt, len(prompts)))
      group.append((slot, running))
    yield list(prompts), group, sources

  def _admit_group(
    self,
    shape: tuple[int, int],
    prompts: Sequence[_Prompt],
    admissions: Sequence[tuple[int, Running]],
    sources: Sequence[int],
  ) -> None:
    """Prefills distinct prompts once each, and writes them to the slots of their requests."""
    length, span = shape
    num_prompts = self._prefill_rows(length) if length else 0
    if not self._batch_invariant:
      longest = max(len(running.request.prompt) for _, running in admissions)
      self._fit_cache(max(longest, self._cache_length))
      # Padded to a power of two, which bounds the number of compilations.
      shards = partitioning.num_batch_shards(self._mesh)
      if prompts:
        num_prompts = min(num_prompts, max(1 << (len(prompts) - 1).bit_length(), shards))
    # Two shapes only: as many requests as prompts, or, if samples share prompts, as slots.
    size = num_prompts if 0 < len(admissions) <= num_prompts else self.num_slots
    requests = [running.request for _, running in admissions]
    slots_R = np.full(size, self.num_slots, np.int32)  # out of range: padding, which is dropped
    slots_R[: len(admissions)] = [slot for slot, _ in admissions]
    words_R4 = np.zeros((size, 4), np.uint32)
    for row, request in enumerate(requests):
      # 32-bit words: JAX has no 64-bit integers by default.
      high, low = divmod(request.record_id, 2**32)
      words_R4[row] = request.seed, high, low, request.sample
    prompts_PT = sources_R = prefixes = None
    if length:
      prompts_PT = np.full((num_prompts, length), self._pad_id, np.int32)
      for row, (_, rest) in enumerate(prompts):
        prompts_PT[row, : len(rest)] = rest
      sources_R = np.zeros(size, np.int32)
      sources_R[: len(sources)] = sources
    if span:
      prefixes = self._prefixes.rows([chain for chain, _ in prompts], num_prompts, span)
    self._counts["prefills"] += bool(length)
    self._counts["prompt_tokens"] += sum(len(request.prompt) for request in requests)
    self._counts["prefilled_tokens"] += sum(len(rest) for _, rest in prompts)
    new_rows = self._new_rows([running for _, running in admissions], size)
    with jax.set_mesh(self._mesh):
      self._rows, self._cache = self._programs.admit(
        self._params,
        self._rows,
        self._cache,
        new_rows,
        words_R4,
        slots_R,
        prompts_PT,
        sources_R,
        prefixes,
      )

  def _draw_tokens(self) -> None:
    features, extras, failures = self._features()
    for slot, reason in failures.items():
      self._running[slot].fail(reason)
    self._free(failures)
    if not self.num_running:
      return
    num_steps = self._num_steps(features)
    if not self._batch_invariant:
      longest = max(len(r.request.prompt) + len(r.tokens) for r in self._running if r)
      self._fit_cache(min(longest + num_steps, self.max_length))
    with jax.set_mesh(self._mesh):
      self._rows, self._cache, drawn = self._programs.draw(
        self._params, self._rows, self._cache, extras, np.int32(num_steps), features=features
      )
    self._take(jax.device_get(drawn))

  def _num_steps(self, features: decode.Features) -> int:
    if features.is_masked:
      return 1  # the host makes the grammar's mask for the next token from the last one
    runs = [running for running in self._running if running is not None]
    num_steps = decode.STEPS_PER_CALL
    if any(running.is_streamed for running in runs):
      is_first = any(running.is_streamed and not running.tokens for running in runs)
      num_steps = 1 if is_first else min(num_steps, _STREAM_STEPS)
    if self._waiting:  # stop at the first limit that is reached, to refill its slot at once
      num_steps = min(num_steps, *(running.remaining for running in runs))
    return num_steps

  def _features(self) -> tuple[decode.Features, decode.Extras, dict[int, str]]:
    """Returns what running requests need, the arrays for it, and errors by slot."""
    runs = {slot: running for slot, running in enumerate(self._running) if running is not None}
    features = features_of(runs.values(), vocab_size=self._c.vocab_size)
    extras, failures = decode.Extras(), {}
    V = self._c.vocab_size
    if features.penalizes:
      in_prompt_BV = np.zeros((self.num_slots, V), np.bool_)
      counts_BV = np.zeros((self.num_slots, V), np.int32)
      # Counted anew for each call: slots change hands between calls, and the cost is per call. The
      # device counts on within the call.
      for slot, running in runs.items():
        in_prompt_BV[slot, list(running.request.prompt)] = True
        np.add.at(counts_BV[slot], running.tokens, 1)
      extras = extras.replace(in_prompt_BV=in_prompt_BV, counts_BV=counts_BV)
    if features.is_masked:
      masks_BW = np.full((self.num_slots, -(-V // 32)), 0xFFFFFFFF, np.uint32)
      for slot, running in runs.items():
        if running.matcher:
          try:
            running.matcher.allow(masks_BW[slot])
          except Exception as error:
            failures[slot] = str(error)
      extras = extras.replace(masks_BW=masks_BW)
    return features, extras, failures

  def _take(self, drawn: decode.Drawn) -> None:
    """Gives each request its drawn tokens, and frees the slots of those that ended."""
    self._counts["calls"] += 1
    cut_short, ended = [], []
    for slot, running in enumerate(self._running):
      if running is None:
        continue
      try:
        self._counts["new_tokens"] += _push(running, drawn, slot)
      except Exception as error:
        running.fail(f"{type(error).__name__}: {error}")
      if running.completion is None and drawn.is_failed_B[slot]:
        running.fail("the model's logits are not numbers, or no token is allowed")
      elif running.completion is not None and not isinstance(running.completion.stop, int):
        cut_short.append(slot)  # by a stop string or a grammar, unless it was the limit
      if running.completion is not None:
        ended.append(slot)
    if drawn.is_failed_B[ended].any():
      # NaN * 0 is NaN: a NaN left in the cache would poison the slot's next request, although the
      # mask gives its position weight 0.
      with jax.set_mesh(self._mesh):
        self._cache = self._programs.wipe(self._cache, drawn.is_failed_B)
    self._free(ended, on_device=any(self._running[s].remaining for s in cut_short))

  def _free(self, slots: Iterable[int], *, on_device: bool = True) -> None:
    """Takes ended requests out of their slots.

    Args:
      on_device: whether the device still has to be told: it knows of limits and stop tokens, not
        of stop strings, grammars and cancelled requests.
    """
    slots = list(slots)
    for slot in slots:
      running = self._running[slot]
      self._running[slot] = None
      self._counts[running.completion.finish_reason] += 1
      if running.completion.finish_reason != "cancelled":
        self._ended.append((running.ticket, running.completion))
    # Otherwise the device would draw in the slot until its limit, and keep calls from ending early.
    if slots and on_device:
      ended_B = np.zeros(self.num_slots, np.bool_)
      ended_B[slots] = True
      with jax.set_mesh(self._mesh):
        self._rows = self._programs.end_rows(self._rows, ended_B)

  def _fit_cache(self, length: int) -> None:
    """Makes the cache at least this long; shortens it only while no request has begun to decode."""
    # In powers of two, each of which compiles the programs once.
    needed = _LEAST_CACHE
    while needed < length:
      needed *= 2
    needed = min(needed, self.max_length)
    idle = all(running is None or not running.tokens for running in self._running)
    if needed > self._cache_length or (idle and needed < self._cache_length):
      with jax.set_mesh(self._mesh):
        self._cache = self._programs.resize(self._cache, length=needed)
      self._cache_length = needed


def new_rows(
  runs: Sequence[Running], size: int, *, eos_ids: Sequence[int], pad_id: int
) -> decode.Rows:
  """Makes rows for new requests, without keys, padded with free rows up to `size`."""
  requests = [running.request for running in runs]
  fill = size - len(requests)

  def column(values: Sequence[Any], free: Any) -> np.ndarray:
    return np.array([*values, *[free] * fill], np.asarray(free).dtype)

  num_stops = MAX_STOP_IDS + len(eos_ids)
  stop_ids_BE = np.full((size, num_stops), -1, np.int32)
  allowed_from_BE = np.zeros((size, num_stops), np.int32)
  for row, request in enumerate(requests):
    ids = (*request.stop_ids, *eos_ids)
    stop_ids_BE[row, : len(ids)] = ids
    allowed_from_BE[row] = request.min_new_tokens
    if request.ignore_eos:
      allowed_from_BE[row, len(request.stop_ids) :] = _NEVER
  free = SamplingConfig(temperature=0.0)
  return decode.Rows(
    last_B=column([request.prompt[-1] for request in requests], np.int32(pad_id)),
    positions_B=column([len(request.prompt) - 1 for request in requests], np.int32(0)),
    steps_B=np.zeros(size, np.int32),
    limits_B=column([running.remaining for running in runs], np.int32(0)),
    is_done_B=column([False] * len(requests), np.bool_(True)),
    is_failed_B=np.zeros(size, np.bool_),
    keys_B=None,
    stop_ids_BE=stop_ids_BE,
    allowed_from_BE=allowed_from_BE,
    sampling=sampler.row_sampling([*[r.sampling for r in requests], *[free] * fill]),
  )


def features_of(runs: Iterable[Running], *, vocab_size: int) -> decode.Features:
  """Returns the features that at least one of the requests needs."""
  requests = [running.request for running in runs]
  logprobs = [request.top_logprobs for request in requests if request.top_logprobs is not None]
  # At most two programs: for the drawn tokens alone, or for the largest number of top tokens.
  most = min(MAX_TOP_LOGPROBS, vocab_size)
  return decode.Features(
    truncates=any(request.sampling.truncates for request in requests),
    bans=any(request.min_new_tokens or request.ignore_eos for request in requests),
    penalizes=any(request.sampling.penalizes for request in requests),
    is_masked=any(request.grammar is not None for request in requests),
    num_logprobs=None if not logprobs else most if any(logprobs) else 0,
  )


def _push(running: Running, drawn: decode.Drawn, slot: int) -> int:
  """Gives a request the tokens drawn in its slot; returns how many it took."""
  # The device counts the stop token as drawn; `push` leaves it out.
  num = int(drawn.num_B[slot])
  logprobs = None
  if running.request.top_logprobs is not None:
    logprobs = token_logprobs(drawn, slot, num, running.request.top_logprobs)
  return running.push(drawn.tokens_NB[:num, slot].tolist(), logprobs)


def token_logprobs(drawn: decode.Drawn, slot: int, num: int, num_top: int) -> list[TokenLogprobs]:
  """Returns the log-probabilities of the first `num` tokens drawn in a slot."""
  found = []
  for step in range(num):
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
      ids, values = drawn.top_ids_NBk[step, slot], drawn.top_logprobs_NBk[step, slot]
      top = tuple(zip(ids[:num_top].tolist(), values[:num_top].tolist()))
    found.append(TokenLogprobs(float(drawn.logprobs_NB[step, slot]), top))
  return found


def _buckets(lengths: Iterable[int], longest: int) -> list[int]:
  return sorted({min(length, longest) for length in (*lengths, longest)})
