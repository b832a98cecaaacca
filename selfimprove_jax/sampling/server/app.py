"""The server's application: OpenAI's routes on an `EngineService`."""

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import fastapi
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from selfimprove_jax.sampling.chat import ChatTemplate
from selfimprove_jax.sampling.chat_files import ChatFiles
from selfimprove_jax.sampling.grammar import Grammar, GrammarCompiler
from selfimprove_jax.sampling.requests import Completion
from selfimprove_jax.sampling.server import metrics
from selfimprove_jax.sampling.server.format import ChatFormat, Format, TextFormat, usage
from selfimprove_jax.sampling.server.schema import ApiError, Body, ChatBody, TextBody, parse
from selfimprove_jax.sampling.server.service import (
  BusyError,
  EngineError,
  EngineService,
  StoppedError,
  Stream,
)

_logger = logging.getLogger(__name__)
ENDING = "the server shuts down"
_MAX_GRAMMARS = 64  # compiled ones that are kept


@dataclasses.dataclass(frozen=True)
class ServedModel:
  """Attributes:
  name: what requests call it.
  chat: None if it has no chat template; `why_no_chat` then says what to do.
  vocab_size: rows of its logits; a prompt of ids may hold any of them.
  max_length: prompt and new tokens together.
  """

  name: str
  files: ChatFiles
  chat: ChatTemplate | None
  why_no_chat: str | None
  grammars: GrammarCompiler
  vocab_size: int
  max_length: int


def make_app(service: EngineService, model: ServedModel) -> fastapi.FastAPI:
  """The application; when it ends, it closes the service."""

  @contextlib.asynccontextmanager
  async def lifespan(_):
    yield
    await run_in_threadpool(service.close, ENDING)

  # No pages of documentation: they fetch their scripts from elsewhere.
  app = fastapi.FastAPI(
    title="selfimprove_jax", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
  )
  routes = _Routes(service, model)
  app.get("/health")(routes.health)
  app.get("/metrics")(routes.metrics)
  app.get("/v1/models")(routes.models)
  app.get("/v1/models/{name:path}")(routes.one_model)
  app.post("/v1/chat/completions")(routes.chat)
  app.post("/v1/completions")(routes.text)
  app.exception_handler(ApiError)(_answer_error)
  app.exception_handler(HTTPException)(_answer_http_error)
  app.exception_handler(Exception)(_answer_bug)
  return app


class _Routes:
  def __init__(self, service: EngineService, model: ServedModel):
    self._service = service
    self._model = model
    self._created = int(time.time())
    self._times = metrics.Times()
    self._grammar = functools.lru_cache(maxsize=_MAX_GRAMMARS)(self._compile)

  async def health(self):
    stopped = self._service.stopped
    status = {"status": "ok"} if stopped is None else {"status": "stopped", "reason": stopped}
    return JSONResponse(status, 200 if stopped is None else 503)

  async def metrics(self):
    text = metrics.prometheus(self._service.stats(), self._times)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

  async def models(self):
    return {"object": "list", "data": [self._card()]}

  async def one_model(self, name: str):
    self._check_name(name)
    return self._card()

  async def chat(self, request: fastapi.Request):
    body = parse(ChatBody, await request.body())
    self._check_name(body.model)
    chat = self._model.chat
    if chat is None:
      raise ApiError(400, self._model.why_no_chat, code="no_chat_template")
    with _refusals("messages"):
      prompt = await run_in_threadpool(chat.render, body.messages)
    form = ChatFormat(self._model.name, self._model.grammars.token_bytes, body.n or 1)
    ends = chat.stop_ids, chat.stop_strings
    return await self._complete(request, body, [prompt], form, *ends)

  async def text(self, request: fastapi.Request):
    body = parse(TextBody, await request.body())
    self._check_name(body.model)
    prompts = [await run_in_threadpool(self._prompt, prompt) for prompt in body.prompts()]
    echoes = [""] * len(prompts)
    if body.echo:
      decode = self._model.files.tokenizer.decode
      echoes = [p if isinstance(p, str) else decode(p) for p in body.prompts()]
    echoes = [echo for echo in echoes for _ in range(body.n or 1)]
    form = TextFormat(self._model.name, self._model.grammars.token_bytes, echoes)
    return await self._complete(request, body, prompts, form, self._model.files.eos_ids, ())

  def _prompt(self, prompt):
    if isinstance(prompt, str):
      return [*self._model.files.prefix_ids, *self._model.files.tokenizer.encode(prompt)]
    if max(prompt) >= self._model.vocab_size:
      message = f"prompt has token {max(prompt)}; the last is {self._model.vocab_size - 1}"
      raise ApiError(400, message, param="prompt")
    return prompt

  async def _complete(self, request, body: Body, prompts, form: Format, stop_ids, stop_strings):
    param = "messages" if isinstance(body, ChatBody) else "prompt"
    for prompt in prompts:
      if len(prompt) >= self._model.max_length:
        raise ApiError(
          400,
          f"the prompt has {len(prompt)} tokens; prompt and completion together may have "
          f"{self._model.max_length}",
          code="context_length_exceeded",
          param=param,
        )
    began = time.monotonic()
    with _refusals(None):
      grammar = await run_in_threadpool(self._grammar, body.grammar_key())
      asked = body.requests(
        prompts,
        max_length=self._model.max_length,
        grammar=grammar,
        stop_ids=tuple(token for token in stop_ids if token not in self._model.files.eos_ids),
        stop_strings=stop_strings,
      )
      stream = await self._service.submit(asked)
    num_prompt_tokens = sum(map(len, prompts))
    updates = self._times.watch(stream, began)
    if body.stream:
      chunks = _chunks(updates, form, len(asked), num_prompt_tokens, body.wants_usage_chunk)
      return _Events(_as_events(chunks), stream)
    async with stream:
      completions = await _unless_gone(request, _collect(updates, len(asked)))
    if completions is None:
      return PlainTextResponse("", 499)  # nobody reads it
    return JSONResponse(form.whole(completions, num_prompt_tokens))

  def _compile(self, key) -> Grammar | None:
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

  def _check_name(self, name):
    if name != self._model.name:
      message = f"there is no model {name!r}; there is {self._model.name!r}"
      raise ApiError(404, message, code="model_not_found", param="model")

  def _card(self):
    return {
      "id": self._model.name,
      "object": "model",
      "created": self._created,
      "owned_by": "selfimprove_jax",
      "max_model_len": self._model.max_length,
    }


@contextlib.contextmanager
def _refusals(param):
  """What the service and a request's own checks raise, as answers."""
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


async def _collect(updates: AsyncIterator, number: int) -> list[Completion]:
  completions: dict[int, Completion] = {}
  try:
    async for index, update in updates:
      if update.completion is not None:
        _check_completion(update.completion)
        completions[index] = update.completion
  except (StoppedError, EngineError) as error:
    raise _api_error(error) from error
  return [completions[index] for index in range(number)]


async def _unless_gone(request: fastapi.Request, work: Any) -> Any:
  """What the work gives; None if the client goes away before."""

  async def gone():
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
  updates: AsyncIterator, form: Format, number: int, num_prompt_tokens: int, with_usage: bool
) -> AsyncIterator[dict[str, Any] | None]:
  """The chunks of a stream, and None after the last; what fails is a chunk too."""
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
    yield _api_error(error).body()


async def _as_events(chunks: AsyncIterator) -> AsyncIterator[str]:
  async for chunk in chunks:
    yield f"data: {'[DONE]' if chunk is None else json.dumps(chunk)}\n\n"


class _Events(StreamingResponse):
  """Server-sent events; however it ends, the requests that feed it end with it."""

  def __init__(self, events: AsyncIterator[str], stream: Stream):
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    super().__init__(events, media_type="text/event-stream", headers=headers)
    self._stream = stream

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      self._stream.cancel()


async def _answer_error(_, error: ApiError) -> JSONResponse:
  headers = {"retry-after": "1"} if error.status in (429, 503) else None
  return JSONResponse(error.body(), error.status, headers=headers)


async def _answer_http_error(_, error: HTTPException) -> JSONResponse:
  return JSONResponse(ApiError(error.status_code, error.detail).body(), error.status_code)


async def _answer_bug(request: fastapi.Request, error: Exception) -> JSONResponse:
  _logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
  return JSONResponse(ApiError(500, "an error inside the server; its log has more").body(), 500)
