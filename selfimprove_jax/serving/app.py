"""The server's application: OpenAI's routes on an `EngineService`."""

import asyncio
import contextlib
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

import fastapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from selfimprove_jax.language_models.chat import PLAIN
from selfimprove_jax.language_models.local import LocalModel
from selfimprove_jax.sampling.grammar import Grammar
from selfimprove_jax.sampling.requests import Completion, ScoreRequest, TokenLogprobs, Update
from selfimprove_jax.serving import metrics
from selfimprove_jax.serving.format import ChatFormat, Format, TextFormat, usage
from selfimprove_jax.serving.gate import Gate
from selfimprove_jax.serving.schema import ApiError, Body, ChatBody, TextBody, parse
from selfimprove_jax.serving.service import (
  BusyError,
  EngineError,
  EngineService,
  StoppedError,
  Stream,
)

_logger = logging.getLogger(__name__)
ENDING = "the server shuts down"
_MAX_GRAMMARS = 64  # compiled grammars that are kept
_CLIENT_GONE = 499  # nginx's status; nobody reads it


def make_app(
  service: EngineService,
  model: LocalModel,
  *,
  name: str,
  host: str,
  key: str | None,
  max_body_bytes: int,
) -> fastapi.FastAPI:
  """Makes the application; it closes the service when it shuts down.

  Args:
    service: runs the engine of `model`.
    name: name of the model in requests.
    host, key, max_body_bytes: see `Gate`.
  """

  @contextlib.asynccontextmanager
  async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
    yield
    await run_in_threadpool(service.close, ENDING)

  app = fastapi.FastAPI(
    title="selfimprove_jax",
    lifespan=lifespan,
    # The documentation pages load scripts from other hosts.
    docs_url=None,
    redoc_url=None,
    openapi_url=None,
    middleware=[Middleware(Gate, key=key, host=host, max_body_bytes=max_body_bytes)],
  )
  routes = _Routes(service, model, name)
  app.get("/health")(routes.health)
  app.get("/metrics")(routes.metrics)
  app.get("/v1/models")(routes.models)
  app.get("/v1/models/{name:path}")(routes.one_model)
  app.post("/v1/chat/completions")(routes.chat)
  app.post("/v1/completions")(routes.text)
  app.exception_handler(ApiError)(_answer_error)
  app.exception_handler(HTTPException)(_answer_http_error)
  app.exception_handler(ClientDisconnect)(_answer_nobody)
  app.exception_handler(Exception)(_answer_bug)
  return app


class _Routes:
  def __init__(self, service: EngineService, model: LocalModel, name: str):
    self._service = service
    self._model = model
    self._name = name
    self._created = int(time.time())
    self._metrics = metrics.Metrics(service.stats)
    self._grammar = functools.lru_cache(maxsize=_MAX_GRAMMARS)(self._compile)
    added = model.tokenizer.backend.get_added_tokens_decoder()
    self._special_ids = {token.content: id_ for id_, token in added.items() if token.special}

  async def health(self) -> Response:
    stopped = self._service.stopped
    status = {"status": "ok"} if stopped is None else {"status": "stopped", "reason": stopped}
    return JSONResponse(status, 200 if stopped is None else 503)

  async def metrics(self) -> Response:
    return Response(self._metrics.text(), media_type=metrics.CONTENT_TYPE)

  async def models(self) -> dict[str, Any]:
    return {"object": "list", "data": [self._card()]}

  async def one_model(self, name: str) -> dict[str, Any]:
    self._check_name(name)
    return self._card()

  async def chat(self, request: fastapi.Request) -> Response:
    body = parse(ChatBody, await request.body())
    self._check_name(body.model)
    chat = self._model.chat
    if chat is None:
      raise ApiError(
        400,
        f"model {self._name!r} has no chat template: use /v1/completions, or start the server with "
        f"--chat_template={PLAIN}, or with the path of a Jinja file",
        code="no_chat_template",
      )
    with _refusals("messages"):
      prompt = await run_in_threadpool(chat.render, body.messages)
    form = ChatFormat(self._name, self._model.grammars.token_bytes, body.n or 1)
    return await self._complete(request, body, [prompt], form, chat.stop_strings)

  async def text(self, request: fastapi.Request) -> Response:
    body = parse(TextBody, await request.body())
    self._check_name(body.model)
    prompts = [await run_in_threadpool(self._prompt, prompt) for prompt in body.prompts()]
    echoes = [""] * len(prompts)
    if body.echo:
      decode = self._model.tokenizer.decode
      echoes = [p if isinstance(p, str) else decode(p) for p in body.prompts()]
    echoes = [echo for echo in echoes for _ in range(body.n or 1)]
    form = TextFormat(self._name, self._model.grammars.token_bytes, echoes)
    if body.echoes_logprobs:
      scores = await self._score_prompts(body, prompts)
      form.prompts = [score for score in scores for _ in range(body.n or 1)]
      if body.max_tokens == 0:
        empty = Completion([], "length", text="", logprobs=[])
        num_prompt_tokens = sum(map(len, prompts))
        return JSONResponse(form.whole([empty] * len(echoes), num_prompt_tokens))
    return await self._complete(request, body, prompts, form, ())

  async def _score_prompts(
    self, body: TextBody, prompts: list[list[int]]
  ) -> list[tuple[list[int], list[TokenLogprobs | None]]]:
    """Returns the tokens of each prompt with their log-probabilities; the first one has none.

    Without the tokens that the server puts before a prompt, which the client does not know of.
    """
    scored = [prompt for prompt in prompts if len(prompt) > 1]
    with _refusals("prompt"):
      asked = [
        ScoreRequest(prompt=prompt[:1], continuation=prompt[1:], num_top=body.logprobs)
        for prompt in scored
      ]
      found = iter(await self._service.score(asked))
    results = []
    for given, prompt in zip(body.prompts(), prompts, strict=True):
      places: list[TokenLogprobs | None] = [None]
      if len(prompt) > 1:
        score = next(found)
        if score.error is not None:
          raise ApiError(400, score.error, param="prompt")
        top = score.top or [()] * len(score.logprobs)
        places += [TokenLogprobs(float(lp), t) for lp, t in zip(score.logprobs, top, strict=True)]
      added = len(prompt) - len(self._encode(given)) if isinstance(given, str) else 0
      results.append((prompt[added:], places[added:]))
    return results

  def _encode(self, text: str) -> list[int]:
    # Clients that render a chat themselves write special tokens into the prompt.
    return self._model.encode_markup(text)

  def _prompt(self, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
      ids, prefix = self._encode(prompt), list(self._model.prefix_ids)
      return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]
    vocab_size = self._model.config.vocab_size
    if max(prompt) >= vocab_size:
      message = f"prompt has token {max(prompt)}; the last is {vocab_size - 1}"
      raise ApiError(400, message, param="prompt")
    return prompt

  async def _complete(
    self,
    request: fastapi.Request,
    body: Body,
    prompts: list[list[int]],
    form: Format,
    stop_strings: tuple[str, ...],
  ) -> Response:
    param = "messages" if isinstance(body, ChatBody) else "prompt"
    max_length = self._model.max_length
    for prompt in prompts:
      if len(prompt) >= max_length:
        raise ApiError(
          400,
          f"the prompt has {len(prompt)} tokens; prompt and completion together may have "
          f"{max_length}",
          code="context_length_exceeded",
          param=param,
        )
    began = time.monotonic()
    with _refusals(None):
      grammar = await run_in_threadpool(self._grammar, body.grammar_key())
      asked = body.requests(
        prompts,
        max_length=max_length,
        grammar=grammar,
        stop_strings=stop_strings,
        special_ids=self._special_ids,
      )
      stream = await self._service.submit(asked)
    num_prompt_tokens = sum(map(len, prompts))
    updates = self._metrics.watch(stream, began)
    if body.stream:
      form.has_usage_chunk = body.wants_usage_chunk
      chunks = _chunks(updates, form, num_prompt_tokens, body.wants_usage_chunk)
      return _Events(_as_events(chunks), stream)
    async with stream:
      completions = await _unless_gone(request, _collect(updates, len(asked)))
    if completions is None:
      return await _answer_nobody()
    return JSONResponse(form.whole(completions, num_prompt_tokens))

  def _compile(self, key: tuple[str, str] | None) -> Grammar | None:
    if key is None:
      return None
    kind, definition = key
    compiler = self._model.grammars
    try:
      match kind:
        case "choices":
          return compiler.choices(json.loads(definition))
        case "regex":
          return compiler.regex(definition)
        case "response_format":
          return compiler.json_schema(json.loads(definition))
    except ValueError as error:
      raise ApiError(400, str(error), param=kind) from error

  def _check_name(self, name: str) -> None:
    if name != self._name:
      message = f"there is no model {name!r}; there is {self._name!r}"
      raise ApiError(404, message, code="model_not_found", param="model")

  def _card(self) -> dict[str, Any]:
    return {
      "id": self._name,
      "object": "model",
      "created": self._created,
      "owned_by": "selfimprove_jax",
      "max_model_len": self._model.max_length,
    }


@contextlib.contextmanager
def _refusals(param: str | None) -> Iterator[None]:
  """Turns errors of the service, and of checks of a request, into error responses."""
  try:
    yield
  except ValueError as error:
    raise ApiError(400, str(error), param=param) from error
  except (BusyError, StoppedError, EngineError) as error:
    raise _api_error(error) from error


def _api_error(error: Exception) -> ApiError:
  match error:
    case ApiError():
      return error
    case BusyError():
      return ApiError(429, f"the server is busy: {error}", code="busy")
    case StoppedError():
      return ApiError(503, str(error), code="stopped")
  return ApiError(500, f"the engine failed: {error}", code="engine_failed")


def _check_completion(completion: Completion) -> None:
  if completion.finish_reason not in ("stop", "length"):
    reason = completion.error or completion.finish_reason
    raise ApiError(500, f"a completion failed: {reason}", code="completion_failed")


async def _collect(updates: AsyncIterator[tuple[int, Update]], number: int) -> list[Completion]:
  completions: dict[int, Completion] = {}
  try:
    async for index, update in updates:
      if update.completion is not None:
        _check_completion(update.completion)
        completions[index] = update.completion
  except (StoppedError, EngineError) as error:
    raise _api_error(error) from error
  return [completions[index] for index in range(number)]


async def _unless_gone(request: fastapi.Request, work: Coroutine) -> Any:
  """Awaits the work and returns its result, or None if the client disconnects first."""

  async def gone() -> None:
    while (await request.receive())["type"] != "http.disconnect":
      pass

  tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return tasks[0].result() if tasks[0].done() else None
  finally:
    for task in tasks:
      task.cancel()
    await asyncio.wait(tasks)


async def _chunks(
  updates: AsyncIterator[tuple[int, Update]],
  form: Format,
  num_prompt_tokens: int,
  with_usage: bool,
) -> AsyncIterator[dict[str, Any] | None]:
  """Yields the chunks of a stream, then None; an error is the last chunk instead."""
  completions: list[Completion] = []
  try:
    for chunk in form.first():
      yield chunk
    async for index, update in updates:
      if update.completion is not None:
        _check_completion(update.completion)
        completions.append(update.completion)
      for chunk in form.chunks(index, update):
        yield chunk
    if with_usage:
      yield form.usage_chunk(usage(num_prompt_tokens, completions))
    yield None
  except (ApiError, StoppedError, EngineError) as error:
    # The status 200 has been sent already.
    yield _api_error(error).body()


async def _as_events(chunks: AsyncIterator[dict[str, Any] | None]) -> AsyncIterator[str]:
  async for chunk in chunks:
    yield f"data: {'[DONE]' if chunk is None else json.dumps(chunk)}\n\n"


class _Events(StreamingResponse):
  """Server-sent events; the requests behind them are cancelled however the response ends."""

  def __init__(self, events: AsyncIterator[str], stream: Stream):
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    super().__init__(events, media_type="text/event-stream", headers=headers)
    self._stream = stream

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      self._stream.cancel()


async def _answer_error(_: fastapi.Request, error: ApiError) -> Response:
  return JSONResponse(error.body(), error.status, headers=error.headers())


async def _answer_http_error(_: fastapi.Request, error: HTTPException) -> Response:
  return JSONResponse(ApiError(error.status_code, error.detail).body(), error.status_code)


async def _answer_nobody(*_: Any) -> Response:
  return PlainTextResponse("", _CLIENT_GONE)


async def _answer_bug(request: fastapi.Request, error: Exception) -> Response:
  _logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
  return JSONResponse(ApiError(500, "internal error; see the server's log").body(), 500)
