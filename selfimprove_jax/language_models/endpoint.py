"""Any OpenAI-compatible endpoint as a language model, with limits, a cache and a hard cap.

  store = CallStore("calls.sqlite", max_usd=20)
  prices = Prices(input_per_million=0.15, output_per_million=0.6)
  model = Endpoint(
    "https://api.example.com/v1", "some-model", store=store, prices=prices,
    api_key_env="EXAMPLE_API_KEY", limits=Limits(requests_per_minute=500),
  )
  print(model.estimate(requests))
  for reply in model.generate(requests): ...

Calls run in one event loop in a thread of its own; each answer is in the store before it is handed
on, so a run that was killed goes on with what it had paid for.
"""

import asyncio
import collections
import dataclasses
import functools
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from selfimprove_jax import artifacts
from selfimprove_jax.language_models import chat_api, structured
from selfimprove_jax.language_models.chat_api import Prices
from selfimprove_jax.language_models.protocol import Reply, TextRequest, Usage
from selfimprove_jax.language_models.store import Answer, BudgetError, CallStore
from selfimprove_jax.language_models.throttle import Limits, Throttle
from selfimprove_jax.language_models.transport import (
  AttemptError,
  EndpointError,
  RequestError,
  Retries,
  Timeouts,
  Transport,
  with_retries,
)

# Requests taken from the iterator for each that may be under way: one slow reply, behind which the
# others wait to be handed on, does not leave the endpoint idle.
_LOOK_AHEAD = 4
_BUDGET_POLL_SECONDS = 0.05
_LIMITS, _RETRIES, _TIMEOUTS = Limits(), Retries(), Timeouts()


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What requests will take, before the first call.

  Attributes:
    num_requests, num_cached: all of them; those that are in the store, or asked for twice.
    prompt_tokens, most_completion_tokens: of the others; completions count as `max_tokens`.
    prompt_usd, most_usd: the price of the prompts alone, and with completions of full length.
      Repairs and retries come on top.
  """

  num_requests: int
  num_cached: int
  prompt_tokens: int
  most_completion_tokens: int
  prompt_usd: float
  most_usd: float


class Endpoint:
  """A `LanguageModel` behind HTTP.

  A request fails alone (`Reply.error`) if the endpoint refuses it, if it fails in every attempt, or
  if its reply is not of the form asked for after all repairs. It is not in the store then, and is
  tried again in the next run.
  """

  def __init__(
    self,
    base_url: str,
    model: str,
    *,
    store: CallStore,
    prices: Prices,
    api_key_env: str | None,
    limits: Limits = _LIMITS,
    retries: Retries = _RETRIES,
    timeouts: Timeouts = _TIMEOUTS,
    identity: str | None = None,
    extra_body: Mapping[str, Any] | None = None,
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
    max_repairs: int = 2,
    count_tokens: Callable[[str], int] = chat_api.rough_num_tokens,
  ):
    """Args:
    base_url: as in https://host/v1.
    model: by the name that the endpoint knows.
    api_key_env: name of the environment variable that holds the key; None where none is needed.
    identity: what stands for the model in the store's keys; `model` at `base_url` if None. Name
      one for a local server whose address changes.
    extra_body: fields of every request's body beside ours, such as `reasoning_effort`.
    max_tokens_field: what the endpoint calls `max_tokens`.
    max_repairs: turns in which a reply that is not of the form asked for may be mended.
    count_tokens: tokens of a text, for estimates and where the endpoint does not say.

    Raises:
      ValueError: of `Transport`; `max_repairs` is negative; `extra_body` sets a field of ours.
    """
    if max_repairs < 0:
      raise ValueError(f"max_repairs is {max_repairs}; it must be at least 0")
    self.api = chat_api.ChatApi(
      model=model,
      identity=identity or f"{model} at {base_url.rstrip('/')}",
      prices=prices,
      extra_body=dict(extra_body or {}),
      max_tokens_field=max_tokens_field,
      count_tokens=count_tokens,
    )
    self.name = model
    self.store = store
    self.transport = Transport(
      base_url,
      api_key_env=api_key_env,
      timeouts=timeouts,
      max_connections=limits.max_concurrent,
    )
    self.retries = retries
    self._max_repairs = max_repairs
    self._look_ahead = _LOOK_AHEAD * limits.max_concurrent
    self._throttle = Throttle(limits)
    self._under_way: dict[str, _Call] = {}
    self._refused_schemas: set[str] = set()
    self._failures_in_a_row = 0
    self._ended: BaseException | None = None
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, name=f"{model}", daemon=True)
    self._thread.start()

  def generate(self, requests: Iterable[TextRequest]) -> Iterator[Reply]:
    """A reply for each request, in their order. May be called by several threads at once.

    Raises:
      EndpointError: the key is refused, the model unknown, the account empty, the endpoint down.
      BudgetError: what is left of the hard cap is not enough for the next call.
    """
    left = iter(requests)
    pending: collections.deque = collections.deque()
    try:
      while True:
        for request in itertools.islice(left, self._look_ahead - len(pending)):
          pending.append(self.start(self._reply(request)))
        if not pending:
          return
        yield pending.popleft().result()
    finally:
      for future in pending:
        future.cancel()

  def estimate(self, requests: Iterable[TextRequest]) -> Estimate:
    """Tokens and money that the requests will take."""
    num_requests = num_cached = prompt_tokens = completion_tokens = 0
    seen = set()
    for request in requests:
      num_requests += 1
      key = self.api.key(request)
      if key in seen or self.store.find(key) is not None:
        num_cached += 1
        continue
      seen.add(key)
      prompt_tokens += self.api.num_prompt_tokens(request)
      completion_tokens += request.max_tokens
    prices = self.api.prices
    return Estimate(
      num_requests,
      num_cached,
      prompt_tokens,
      completion_tokens,
      prices.usd(Usage(prompt_tokens, 0)),
      prices.usd(Usage(prompt_tokens, completion_tokens)),
    )

  def start(self, coroutine) -> Any:
    """Runs a coroutine in the endpoint's loop; gives its `concurrent.futures.Future`."""
    if not self._thread.is_alive():
      coroutine.close()
      raise ValueError(f"{self.name} is closed")
    return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

  def close(self) -> None:
    """Ends it; answers that are under way, and will be paid for, are waited for and stored."""
    if not self._thread.is_alive():
      return
    self.start(self._shut_down()).result()
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()

  async def _shut_down(self):
    self._ended = self._ended or EndpointError(f"{self.name} was closed")
    calls = list(self._under_way.values())
    for call in calls:
      call.cancel_unless_protected()
    await asyncio.gather(*(call.task for call in calls), return_exceptions=True)
    await self.transport.close()

  async def _reply(self, request: TextRequest) -> Reply:
    try:
      schema = structured.schema_of(request)
      if schema is not None:
        structured.check_schema(schema)
        if isinstance(request.prompt, str):
          raise ValueError("json_schema and choices need messages; the prompt is a bare text")
      return await self._reply_with_repairs(request, structure=schema is not None)
    except (ValueError, RequestError, AttemptError) as error:
      return Reply.failed(request, str(error))

  async def _reply_with_repairs(self, request, *, structure):
    turn, usage, cost, all_cached, parsed, problem = request, Usage(0, 0), 0.0, True, None, None
    for _ in range(1 + self._max_repairs):
      try:
        answer, cached = await self._answer(turn)
      except (RequestError, AttemptError) as error:
        if turn is request:
          raise
        problem = f"{problem}; and asked to repair it: {error}"
        break
      usage, cost, all_cached = usage + answer.usage, cost + answer.cost_usd, all_cached and cached
      problem = chat_api.why_unusable(answer)
      if problem is not None or not structure:
        break
      parsed, problem = structured.read(request, answer.text)
      if problem is None:
        break
      if answer.finish_reason == "length":
        problem = f"the reply was cut at max_tokens={request.max_tokens}: {problem}"
        break
      turn = structured.repair_turn(turn, answer.text, problem)
    return Reply(
      id=request.id,
      text=answer.text,
      finish_reason=answer.finish_reason,
      usage=usage,
      parsed=parsed,
      error=problem,
      cached=all_cached,
      cost_usd=cost,
    )

  async def _answer(self, request: TextRequest) -> tuple[Answer, bool]:
    """The answer, and whether it was there, or is being waited for by a request alike."""
    key = self.api.key(request)
    call = self._under_way.get(key)
    first = call is None or call.task.done() or call.task.cancelling() > 0
    if first:
      call = self._under_way[key] = _Call()
      call.task = asyncio.create_task(self._find_or_pay(key, request, call))
      call.task.add_done_callback(functools.partial(self._forget, key, call))
    call.waiters += 1
    try:
      # Another request may wait for the same call, and one that is sent is paid for.
      answer, cached = await asyncio.shield(call.task)
    finally:
      call.waiters -= 1
      if call.waiters == 0:
        call.cancel_unless_protected()
    return answer, cached or not first

  def _forget(self, key, call, task):
    if self._under_way.get(key) is call:
      del self._under_way[key]
    if not task.cancelled():
      task.exception()  # asked for, lest asyncio complain where nobody waits any more

  async def _find_or_pay(self, key, request, call):
    found = await asyncio.to_thread(self.store.find, key)
    if found is not None:
      return found, True
    try:
      answer = await with_retries(lambda: self._attempt(key, request, call), self.retries)
    except AttemptError as error:
      self._failures_in_a_row += 1
      if self._failures_in_a_row >= self.retries.max_failures_in_a_row:
        self._ended = self._ended or EndpointError(
          f"{self._failures_in_a_row} requests failed one after another, the last with: {error}"
        )
      raise
    except (EndpointError, BudgetError) as error:
      self._ended = self._ended or error
      raise
    self._failures_in_a_row = 0
    return answer, False

  async def _attempt(self, key, request, call):
    """One attempt, from its line in the ledger to its answer in the store."""
    expected = self.api.num_prompt_tokens(request), request.max_tokens
    async with self._throttle.slot(*expected) as took:
      if call.waiters == 0:
        raise asyncio.CancelledError
      call.protected = True
      try:
        number = await self._reserve(key, request, call)
        try:
          answer = await self._post(key, request)
          took(answer.usage.prompt_tokens, answer.usage.completion_tokens)
          self._throttle.succeeded()
          return await asyncio.to_thread(self.store.paid, number, answer)
        except (AttemptError, RequestError, EndpointError) as error:
          if isinstance(error, AttemptError) and error.billed:
            await asyncio.to_thread(self.store.lost, number)
          else:
            took(0, 0)
            await asyncio.to_thread(self.store.not_billed, number)
          if isinstance(error, AttemptError) and error.overloaded:
            self._throttle.cool_down(error.retry_after or self.retries.initial_seconds)
          raise
      finally:
        call.protected = False

  async def _post(self, key, request):
    schema = structured.schema_of(request)
    digest = None if schema is None else artifacts.digest(schema)
    if schema is not None and digest not in self._refused_schemas:
      try:
        return await self._post_once(key, request, enforce_schema=True)
      except RequestError as error:
        if error.status not in (400, 422):
          raise
      # It may be the schema that is refused: the same request without it tells.
      answer = await self._post_once(f"{key}-in-words", request, enforce_schema=False)
      self._refused_schemas.add(digest)
      return answer
    return await self._post_once(key, request, enforce_schema=False)

  async def _post_once(self, key, request, *, enforce_schema):
    path, body = self.api.body(request, enforce_schema=enforce_schema)
    # An endpoint that knows the second header does not do twice what was asked for again.
    headers = {"Content-Type": "application/json", "Idempotency-Key": key}
    content = json.dumps(body).encode()
    payload = await self.transport.send_json("POST", path, content=content, headers=headers)
    return self.api.answer(request, payload)

  async def _reserve(self, key, request, call):
    """A line in the ledger for a call, when there is money for it."""
    most_usd = self.api.prices.usd(self.api.most_usage(request))
    while True:
      if self._ended is not None:
        raise self._ended
      if call.waiters == 0:
        raise asyncio.CancelledError
      try:
        return await asyncio.to_thread(
          self.store.begin, key, model=self.api.identity, most_usd=most_usd
        )
      except BudgetError as error:
        if not error.calls_under_way:
          raise
        # Those count at the most that they may cost: less may be taken in the end.
        await asyncio.sleep(_BUDGET_POLL_SECONDS)


class _Call:
  """A call that one or more requests wait for."""

  def __init__(self):
    self.task: asyncio.Task | None = None
    self.waiters = 0
    self.protected = False  # it is in the ledger, and may be under way and be paid for

  def cancel_unless_protected(self):
    if not self.protected:
      self.task.cancel()
