"""OpenAI-compatible endpoints as language models: rate limits, a cache, a hard cap in dollars.

  store = CallStore("calls.sqlite", max_usd=20)
  prices = Prices(input_per_million=0.15, output_per_million=0.6)
  model = Endpoint(
    "https://api.example.com/v1", "some-model", store=store, prices=prices,
    api_key_env="EXAMPLE_API_KEY", limits=Limits(requests_per_minute=500),
  )
  print(model.estimate(requests))
  for reply in model.generate(requests): ...

Calls run in an event loop in a background thread. Each answer is stored before it is returned, so
a run that was killed continues with the answers that it had paid for.
"""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

from selfimprove_jax.language_models import chat_api, structured
from selfimprove_jax.language_models.chat_api import Prices
from selfimprove_jax.language_models.openai_client import (
  AttemptError,
  EndpointError,
  Limits,
  OpenAIClient,
  RequestError,
  Retries,
  Throttle,
  Timeouts,
  with_retries,
)
from selfimprove_jax.language_models.protocol import (
  Reply,
  Score,
  ScoreRequest,
  TextRequest,
  Usage,
  is_chat,
)
from selfimprove_jax.language_models.store import (
  Answer,
  BudgetError,
  CallStore,
  InFlightError,
  StoreError,
)
from selfimprove_jax.runs import artifacts

T = TypeVar("T")
Q = TypeVar("Q", TextRequest, ScoreRequest)

# Requests read ahead for each call that may be in flight. Replies leave in order, so without them
# one slow call at the head of the line would leave the endpoint idle.
_LOOK_AHEAD = 4
_BUDGET_POLL_SECONDS = 0.05
_LEASE_POLL_SECONDS = 0.05, 1.0  # the first wait, and the longest
_LIMITS, _RETRIES, _TIMEOUTS = Limits(), Retries(), Timeouts()


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Tokens and dollars that requests will take, without repairs and retries.

  Attributes:
    num_requests, num_cached: all requests, and those that are in the store or are duplicates.
    prompt_tokens, most_completion_tokens: tokens of the others; completions count as `max_tokens`.
    prompt_usd, most_usd: price of the prompts alone, and with completions of full length.
  """

  num_requests: int
  num_cached: int
  prompt_tokens: int
  most_completion_tokens: int
  prompt_usd: float
  most_usd: float


class Endpoint:
  """A `LanguageModel` behind HTTP.

  A request fails alone (`Reply.error`) if the endpoint refuses it, if all attempts fail, or if its
  reply is a refusal, was filtered, or violates the schema after all repairs. It is not kept in the
  store then, so the next run retries it.
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
  ) -> None:
    """Starts the event loop; makes no call.

    Args:
      base_url: such as https://host/v1.
      api_key_env: environment variable that holds the key; None where no key is needed.
      identity: identifies the model in the store's keys; None for `model` at `base_url`. Set it for
        a local server whose address changes.
      extra_body: additional fields of every request's body, such as `reasoning_effort`.
      max_repairs: turns in which a reply that violates its schema may be repaired.
      count_tokens: counts a text's tokens, for estimates and where the endpoint reports no usage.

    Raises:
      ValueError: the key is missing or malformed, or an argument is not allowed.
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
    self.name, self.store, self.retries = model, store, retries
    self.client = OpenAIClient(base_url, api_key_env=api_key_env, timeouts=timeouts)
    self._max_repairs = max_repairs
    self._look_ahead = _LOOK_AHEAD * limits.max_concurrent
    self._throttle = Throttle(limits)
    self._in_flight: dict[str, _Call] = {}
    self._refused_schemas: set[str] = set()
    self._failures_in_a_row = 0
    self._ended: BaseException | None = None
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, name=model, daemon=True)
    self._thread.start()

  def generate(self, requests: Iterable[TextRequest]) -> Iterator[Reply]:
    """Yields a reply to each request, in order. Several threads may call it at once.

    Raises:
      EndpointError: the key is refused, the model is unknown, the account is empty, or the endpoint
        is down.
      BudgetError: the rest of the hard cap does not cover the next call.
    """
    return self._stream(requests, self._reply)

  def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Score]:
    """Yields the log-likelihood of each continuation, in order; raises like `generate`.

    An endpoint that returns no log-probabilities of prompts is an `EndpointError`.
    """
    return self._stream(requests, self._score)

  def _stream(
    self, requests: Iterable[Q], ask: Callable[[Q], Coroutine[Any, Any, T]]
  ) -> Iterator[T]:
    source = iter(requests)
    pending: collections.deque[Future[T]] = collections.deque()
    try:
      while True:
        for request in itertools.islice(source, self._look_ahead - len(pending)):
          pending.append(self.start(ask(request)))
        if not pending:
          return
        yield pending.popleft().result()
    finally:
      for future in pending:
        future.cancel()

  def estimate(self, requests: Iterable[TextRequest | ScoreRequest]) -> Estimate:
    """Estimates tokens and dollars, without a call."""
    num_requests = prompt = completion = 0
    seen: set[str] = set()  # keys of the requests that are not in the store
    for request in requests:
      num_requests += 1
      key = self.api.key(request)
      if key not in seen and self.store.find(key) is None:
        seen.add(key)
        prompt += self.api.num_prompt_tokens(request)
        completion += self.api.most_usage(request).completion_tokens
    usd = self.api.prices.usd
    prompt_usd, most_usd = usd(Usage(prompt, 0)), usd(Usage(prompt, completion))
    return Estimate(
      num_requests, num_requests - len(seen), prompt, completion, prompt_usd, most_usd
    )

  def start(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
    """Runs a coroutine in the endpoint's event loop."""
    if not self._thread.is_alive():
      coroutine.close()
      raise ValueError(f"{self.name} is closed")
    return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

  def close(self) -> None:
    """Stops the event loop, after the calls in flight, which will be billed, have been stored."""
    if not self._thread.is_alive():
      return
    self.start(self._shut_down()).result()
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()

  async def _shut_down(self) -> None:
    self._ended = self._ended or EndpointError(f"{self.name} was closed")
    calls = list(self._in_flight.values())  # a copy: a call that ends removes itself
    for call in calls:
      call.cancel_unless_billed()
    await asyncio.gather(*(call.task for call in calls), return_exceptions=True)
    await self.client.close()

  async def _reply(self, request: TextRequest) -> Reply:
    try:
      schema = structured.schema_of(request)
      if schema is not None:
        structured.check_schema(schema)
        if not is_chat(request.prompt):
          raise ValueError("json_schema and choices need messages, and the prompt is a bare text")
      return await self._reply_with_repairs(request, has_schema=schema is not None)
    except (ValueError, RequestError, AttemptError) as error:
      return Reply.failed(request, str(error))

  async def _score(self, request: ScoreRequest) -> Score:
    try:
      answer, cached = await self._answer(request)
    except (ValueError, RequestError, AttemptError) as error:
      return Score.failed(request, str(error))
    tokens = answer.logprobs
    return Score(
      id=request.id,
      logprob=math.fsum(token.logprob for token in tokens),
      num_tokens=len(tokens),
      is_greedy=all(token.logprob >= token.top[0][1] for token in tokens),
      cached=cached,
      cost_usd=answer.cost_usd,
    )

  async def _reply_with_repairs(self, request: TextRequest, *, has_schema: bool) -> Reply:
    turn, usage, cost, all_cached, parsed, problem = request, Usage(0, 0), 0.0, True, None, None
    answers: dict[str, Answer] = {}
    for _ in range(1 + self._max_repairs):
      try:
        answer, cached = await self._answer(turn)
      except (RequestError, AttemptError) as error:
        if turn is request:
          raise
        # The earlier turns are paid for, so their text is returned with both problems.
        problem = f"{problem}; and asked to repair it: {error}"
        break
      answers[self.api.key(turn)] = answer
      usage, cost, all_cached = usage + answer.usage, cost + answer.cost_usd, all_cached and cached
      problem = chat_api.why_unusable(answer)
      if problem is not None or not has_schema:
        break
      parsed, problem = structured.read(request, answer.text)
      if problem is None:
        break
      if answer.finish_reason == "length":  # another turn would be cut at the same length
        problem = f"the reply was cut at max_tokens={request.max_tokens}: {problem}"
        break
      turn = structured.repair_turn(turn, answer.text, problem)
    if problem is not None:  # the next run tries again; the ledger keeps the price
      await asyncio.to_thread(self.store.drop, answers)
    return Reply(
      id=request.id,
      text=parsed if request.choices and problem is None else answer.text,
      finish_reason=answer.finish_reason,
      usage=usage,
      parsed=parsed,
      error=problem,
      cached=all_cached,
      cost_usd=cost,
      logprobs=answer.logprobs,
    )

  async def _answer(self, request: TextRequest | ScoreRequest) -> tuple[Answer, bool]:
    """Returns the answer, and whether it was stored or is shared with an identical request."""
    key = self.api.key(request)
    call = self._in_flight.get(key)
    first = call is None or call.task.done() or call.task.cancelling() > 0
    if first:
      call = self._in_flight[key] = _Call()
      call.task = asyncio.create_task(self._find_or_pay(key, request, call))
      call.task.add_done_callback(functools.partial(self._forget, key, call))
    call.waiters += 1
    try:
      # Shielded: other requests may wait for the same call, and a call that was sent is billed.
      answer, cached = await asyncio.shield(call.task)
    finally:
      call.waiters -= 1
      if call.waiters == 0:
        call.cancel_unless_billed()
    return answer, cached or not first

  def _forget(self, key: str, call: "_Call", task: asyncio.Task) -> None:
    if self._in_flight.get(key) is call:
      del self._in_flight[key]
    if not task.cancelled():
      task.exception()  # retrieved, because asyncio reports exceptions that nobody waited for

  async def _find_or_pay(
    self, key: str, request: TextRequest | ScoreRequest, call: "_Call"
  ) -> tuple[Answer, bool]:
    found = await asyncio.to_thread(self.store.find, key)
    if found is not None:
      return found, True
    try:
      paid = await with_retries(lambda: self._attempt(key, request, call), self.retries)
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
    return paid

  async def _attempt(
    self, key: str, request: TextRequest | ScoreRequest, call: "_Call"
  ) -> tuple[Answer, bool]:
    """Makes one attempt, unless another process has the answer or is about to have it."""
    while True:
      with contextlib.suppress(InFlightError):
        return await self._pay(key, request, call)
      seconds = _LEASE_POLL_SECONDS[0]
      while await asyncio.to_thread(self.store.is_in_flight, key):
        if self._ended is not None:
          raise self._ended
        await asyncio.sleep(seconds)
        seconds = min(1.5 * seconds, _LEASE_POLL_SECONDS[1])

  async def _pay(
    self, key: str, request: TextRequest | ScoreRequest, call: "_Call"
  ) -> tuple[Answer, bool]:
    """Makes one call: entry in the ledger, call, answer in the store."""
    expected = self.api.num_prompt_tokens(request), self.api.most_usage(request).completion_tokens
    async with self._throttle.slot(*expected) as took:
      if call.waiters == 0:
        raise asyncio.CancelledError
      call.may_be_billed = True
      try:
        number = await self._reserve(key, request, call)
        try:
          # Another process may have answered it before this one got the lease.
          if (found := await asyncio.to_thread(self.store.find, key)) is not None:
            took(0, 0)
            await asyncio.to_thread(self.store.not_billed, number)
            return found, True
          answer = await self._post(key, request)
          took(answer.usage.prompt_tokens, answer.usage.completion_tokens)
          self._throttle.succeeded()
          try:
            return await asyncio.to_thread(self.store.paid, number, answer), False
          except StoreError as error:  # such as a full disk: the answer is returned, the run ends
            self._ended = self._ended or error
            return answer, False
        except (AttemptError, RequestError, EndpointError) as error:
          if error.billed:
            await asyncio.to_thread(self.store.lost, number)
          else:
            took(0, 0)
            await asyncio.to_thread(self.store.not_billed, number)
          if isinstance(error, AttemptError) and error.overloaded:
            seconds = error.retry_after or self.retries.initial_seconds
            if seconds <= self.retries.max_retry_after_seconds:  # else the run ends
              self._throttle.cool_down(seconds)
          raise
        except StoreError:
          raise
        except BaseException:  # whatever it was, the call may have been billed
          self.store.lost(number)
          raise
      finally:
        call.may_be_billed = False

  async def _post(self, key: str, request: TextRequest | ScoreRequest) -> Answer:
    schema = structured.schema_of(request) if isinstance(request, TextRequest) else None
    digest = artifacts.digest(schema)
    if schema is None or digest in self._refused_schemas:
      return await self._post_once(key, request, enforce_schema=False)
    try:
      return await self._post_once(key, request, enforce_schema=True)
    except RequestError as error:
      if error.status not in (400, 422):
        raise
    # The endpoint may have refused the schema. The same request without it shows whether it did.
    answer = await self._post_once(f"{key}-in-words", request, enforce_schema=False)
    self._refused_schemas.add(digest)
    return answer

  async def _post_once(
    self, key: str, request: TextRequest | ScoreRequest, *, enforce_schema: bool
  ) -> Answer:
    path, body = self.api.body(request, enforce_schema=enforce_schema)
    # The arguments that the client's methods require; the others keep the names that we gave them.
    named = {n: body.pop(n) for n in ("model", "messages", "prompt") if n in body}

    def call(client: Any, headers: dict[str, Any]) -> Awaitable[Any]:
      # An endpoint that knows idempotency keys does not repeat work when a call is retried.
      headers = headers | {"Idempotency-Key": key}
      resource = client.chat.completions if path == chat_api.CHAT_PATH else client.completions
      return resource.create(**named, extra_body=body, extra_headers=headers)

    return self.api.answer(request, await self.client.send_json(call))

  async def _reserve(self, key: str, request: TextRequest | ScoreRequest, call: "_Call") -> int:
    """Enters a call in the ledger as soon as the budget covers it; returns its number."""
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
        if not error.calls_in_flight:
          raise
        # Calls in flight are entered at their highest possible price and may turn out cheaper.
        await asyncio.sleep(_BUDGET_POLL_SECONDS)


@dataclasses.dataclass(eq=False)
class _Call:
  """A call that one or more requests wait for; it may be billed once it is in the ledger."""

  task: asyncio.Task | None = None
  waiters: int = 0
  may_be_billed: bool = False

  def cancel_unless_billed(self) -> None:
    if not self.may_be_billed:
      self.task.cancel()
