"""Continuous batching: a fixed number of slots, each given the next prompt when its text has ended.

Two kinds of jitted programs do all the work (`decode.py`): one that puts prompts of one bucket of
lengths into slots, and one that draws up to `steps_per_call` tokens in all slots. Their number is
bounded by the buckets and by what requests ask for, whatever the lengths.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from selfimprove_jax import partitioning
from selfimprove_jax.models import llama, unrolled
from selfimprove_jax.sampling import decode
from selfimprove_jax.sampling.programs import STEPS_PER_CALL, make_programs, prefill_rows
from selfimprove_jax.sampling.requests import Completion, Request
from selfimprove_jax.sampling.slots import (
  DecodeText,
  OnUpdate,
  Running,
  check_request,
  features_of,
  new_rows,
  token_logprobs,
)

_LEAST_CACHE = 256
_STREAM_STEPS = 4


class Engine:
  """Samples from one set of parameters. For one thread at a time.

  A completion depends on the parameters and its request alone. With `batch_invariant` that is so to
  the bit, for one number of slots and one hardware: each program has the same shapes whatever else
  is sampled. Without, shapes follow the load, and a token may differ where two are equally likely
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
    steps_per_call: int = STEPS_PER_CALL,
    batch_invariant: bool = True,
  ):
    """Args:
      params: of `model`, on the mesh. The engine works on a copy in another form (`unrolled`), in
        `model.c.dtype`.
      eos_ids: tokens that end a completion.
      num_slots: completions sampled at once.
      max_length: prompt and new tokens of a slot; the cache holds `num_slots` times as many.
      decode_text: ids to text, without special tokens; needed for text and stop strings.
      prompt_buckets: prompt lengths that are compiled for; powers of two if None.
      steps_per_call: most tokens drawn in a slot before its end is seen and the slot refilled.
      batch_invariant: False for a server: prompts are not padded to a batch of one size, and the
        cache is as long as what runs needs.

    Raises:
      ValueError: the slots do not divide over the mesh, or the window is too short.
    """
    if max_length < 2:
      raise ValueError(f"max_length={max_length} must be at least 2: a prompt and a new token")
    partitioning.check_batch(num_slots, mesh)
    c = model.c
    self.num_slots, self.max_length = num_slots, max_length
    self._eos_ids, self._pad_id = tuple(eos_ids), pad_id
    self._decode_text = decode_text
    self._steps_per_call = steps_per_call
    self._batch_invariant = batch_invariant
    # Of a prompt all but the last token is prefilled; that one is the first to be decoded.
    longest = max_length - 1
    buckets = prompt_buckets or [1 << n for n in range(4, longest.bit_length() + 1)]
    self._buckets = sorted({min(bucket, longest) for bucket in (*buckets, longest)})
    self._mesh = mesh
    self._c = unrolled.unroll_config(c)
    self._params = unrolled.unroll_params(params, c, mesh)
    self._programs = make_programs(self._c, mesh, steps_per_call=steps_per_call)
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
    """Programs that put prompts into slots or draw tokens, compiled so far."""
    return self._programs.admit._cache_size() + self._programs.draw._cache_size()

  @property
  def num_running(self) -> int:
    return sum(running is not None for running in self._running)

  @property
  def num_waiting(self) -> int:
    return len(self._waiting)

  def stats(self) -> dict[str, int]:
    """Counts since the engine was made: tokens, requests, calls, and ends by reason."""
    return dict(self._counts)

  def submit(self, request: Request, on_update: OnUpdate | None = None) -> int:
    """Puts a request in the queue; gives the ticket by which `step` names it.

    Args:
      on_update: called by `step` with each gain of the request, and with its end.

    Raises:
      ValueError: it can never run, with the reason.
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
    """Ends a request without a completion; one that has ended already is left alone."""
    num_waiting = len(self._waiting)
    self._waiting = collections.deque(item for item in self._waiting if item[0] != ticket)
    self._counts["cancelled"] += num_waiting - len(self._waiting)
    for slot, running in enumerate(self._running):
      if running is not None and running.ticket == ticket:
        running.cancel()
        self._free([slot])

  def generate(
    self,
    requests: Sequence[Request],
    *,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
  ) -> list[Completion]:
    """One completion for each request, in their order; see `stream`."""
    completions = dict(self.stream(requests, on_tokens=on_tokens))
    return [completions[index] for index in range(len(requests))]

  def stream(
    self,
    requests: Iterable[Request],
    *,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
  ) -> Iterator[tuple[int, Completion]]:
    """(place in `requests`, completion) as they end.

    Requests are taken as slots become free, so there may be any number of them. One that can never
    run gives a completion whose `finish_reason` is `error`. What is unfinished when the iterator is
    closed is cancelled.

    Args:
      on_tokens: told after each call how many tokens were drawn.
    """
    source = enumerate(requests)
    places: dict[int, int] = {}
    try:
      while True:
        exhausted = False
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

  def step(self) -> list[tuple[int, Completion]]:
    """Fills free slots, then draws some tokens in all; gives (ticket, completion) of what ended."""
    self._fill_slots()
    if self.num_running:
      self._draw_tokens()
    ended, self._ended = self._ended, []
    return ended

  def _fill_slots(self):
    free = [slot for slot, running in enumerate(self._running) if running is None]
    by_bucket = collections.defaultdict(list)
    while free and self._waiting:
      ticket, request, on_update = self._waiting.popleft()
      running = Running(
        request,
        ticket,
        eos_ids=self._eos_ids,
        limit=min(request.max_new_tokens, self.max_length - len(request.prompt)),
        decode_text=self._decode_text,
        on_update=on_update,
      )
      slot = free.pop(0)
      self._running[slot] = running
      prefilled = len(request.prompt) - 1
      bucket = next((b for b in self._buckets if b >= prefilled), 0) if prefilled else 0
      by_bucket[bucket].append((slot, running))
    for bucket, admissions in sorted(by_bucket.items()):
      for group in self._groups(bucket, admissions):
        self._admit_group(bucket, *group)

  def _prefill_rows(self, bucket):
    return prefill_rows(bucket, self.num_slots, self._mesh, is_padded=self._batch_invariant)

  def _groups(self, bucket, admissions):
    """(prompts, admissions, their prompts' places), each of one prefill."""
    if not bucket:
      yield [], admissions, []
      return
    prompts: dict[tuple[int, ...], int] = {}
    group, sources = [], []
    for slot, running in admissions:
      prompt = tuple(running.request.prompt[:-1])
      if prompt not in prompts and len(prompts) == self._prefill_rows(bucket):
        yield list(prompts), group, sources
        prompts, group, sources = {}, [], []
      sources.append(prompts.setdefault(prompt, len(prompts)))
      group.append((slot, running))
    yield list(prompts), group, sources

  def _admit_group(self, bucket, prompts, admissions, sources):
    if not self._batch_invariant:
      longest = max(len(running.request.prompt) for _, running in admissions)
      self._fit_cache(max(longest, self._cache_length))
    num_prompts = self._prefill_rows(bucket) if bucket else 0
    if not self._batch_invariant and prompts:  # as many as there are, up to a power of two
      shards = partitioning.num_batch_shards(self._mesh)
      num_prompts = min(num_prompts, max(1 << (len(prompts) - 1).bit_length(), shards))
    # Samples of one prompt may be many more than the prompts of a prefill.
    size = num_prompts if 0 < len(admissions) <= num_prompts else self.num_slots
    requests = [running.request for _, running in admissions]
    slots_R = np.full(size, self.num_slots, np.int32)
    slots_R[: len(admissions)] = [slot for slot, _ in admissions]
    words_R4 = np.zeros((size, 4), np.uint32)
    for row, request in enumerate(requests):
      high, low = divmod(request.record_id, 2**32)
      words_R4[row] = request.seed, high, low, request.sample
    prompts_PT = sources_R = None
    if bucket:
      prompts_PT = np.full((num_prompts, bucket), self._pad_id, np.int32)
      for row, prompt in enumerate(prompts):
        prompts_PT[row, : len(prompt)] = prompt
      sources_R = np.zeros(size, np.int32)
      sources_R[: len(sources)] = sources
    self._counts["prefills"] += bool(bucket)
    self._counts["prompt_tokens"] += sum(len(request.prompt) for request in requests)
    self._counts["prefilled_tokens"] += sum(map(len, prompts))
    with jax.set_mesh(self._mesh):
      self._rows, self._cache = self._programs.admit(
        self._params,
        self._rows,
        self._cache,
        self._new_rows([running for _, running in admissions], size),
        words_R4,
        slots_R,
        prompts_PT,
        sources_R,
      )

  def _new_rows(self, runs, size):
    return new_rows(runs, size, eos_ids=self._eos_ids, pad_id=self._pad_id)

  def _draw_tokens(self):
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

  def _num_steps(self, features):
    if features.is_masked:
      return 1
    runs = [running for running in self._running if running is not None]
    num_steps = self._steps_per_call
    if any(running.is_streamed for running in runs):
      is_first = any(running.is_streamed and not running.tokens for running in runs)
      num_steps = 1 if is_first else min(num_steps, _STREAM_STEPS)
    if self._waiting:  # a slot whose end is known is refilled at once
      num_steps = min(num_steps, *(running.remaining for running in runs))
    return num_steps

  def _features(self):
    """What the running requests ask for, the arrays for it, and those that can't go on."""
    runs = {slot: running for slot, running in enumerate(self._running) if running is not None}
    features = features_of(runs.values(), vocab_size=self._c.vocab_size)
    extras, failures = decode.Extras(), {}
    V = self._c.vocab_size
    if features.penalizes:
      in_prompt_BV = np.zeros((self.num_slots, V), np.bool_)
      counts_BV = np.zeros((self.num_slots, V), np.int32)
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
          except RuntimeError as error:
            failures[slot] = str(error)
      extras = extras.replace(masks_BW=masks_BW)
    return features, extras, failures

  def _take(self, drawn):
    """Gives each request what was drawn for it."""
    self._counts["calls"] += 1
    cut_short, ended = [], []
    for slot, running in enumerate(self._running):
      if running is None:
        continue
      num = int(drawn.num_B[slot])
      logprobs = None
      if running.request.top_logprobs is not None:
        logprobs = token_logprobs(drawn, slot, num, running.request.top_logprobs)
      self._counts["new_tokens"] += running.push(drawn.tokens_NB[:num, slot].tolist(), logprobs)
      if running.completion is None and drawn.is_failed_B[slot]:
        running.fail("the model's logits are not numbers, or no token is allowed")
      elif running.completion is not None and not isinstance(running.completion.stop, int):
        cut_short.append(slot)  # by what the device does not know, unless it was the limit
      if running.completion is not None:
        ended.append(slot)
    if drawn.is_failed_B[ended].any():
      # What is no number stays so times the zero by which attention leaves it out.
      with jax.set_mesh(self._mesh):
        self._cache = self._programs.wipe(self._cache, drawn.is_failed_B)
    self._free(ended, on_device=any(self._running[s].remaining for s in cut_short))

  def _free(self, slots, *, on_device: bool = True):
    """Takes ended requests out of their slots.

    Args:
      on_device: some of them ended by what the device does not know (a stop string).
    """
    for slot in slots:
      running = self._running[slot]
      self._running[slot] = None
      self._counts[running.completion.finish_reason] += 1
      if running.completion.finish_reason != "cancelled":
        self._ended.append((running.ticket, running.completion))
    if slots and on_device:
      ended_B = np.zeros(self.num_slots, np.bool_)
      ended_B[list(slots)] = True
      with jax.set_mesh(self._mesh):
        self._rows = self._programs.end_rows(self._rows, ended_B)

  def _fit_cache(self, length: int) -> None:
    """Makes the cache long enough; shorter only when nothing has begun to run."""
    needed = _LEAST_CACHE
    while needed < length:
      needed *= 2
    needed = min(needed, self.max_length)
    idle = all(running is None or not running.tokens for running in self._running)
    if needed > self._cache_length or (idle and needed < self._cache_length):
      with jax.set_mesh(self._mesh):
        self._cache = self._programs.resize(self._cache, length=needed)
      self._cache_length = needed
