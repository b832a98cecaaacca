"""Requests as files of OpenAI's Batch API, at about half the price, and their results.

  write_requests("batch", requests, model=model)
  submit("batch", model=model, prices=half)               # or upload the files by other means
  report = collect("batch", model=model, prices=half)     # repeat until no request waits
  for reply in model.generate(requests): ...              # from the store; failures are asked live

A folder holds NAME.requests.jsonl, NAME.results.jsonl (written by `collect`, or by hand) and
NAME.batch.json, the ids that the endpoint gave to file and batch. Each function can be repeated: it
does what is left to do.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import operator
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from selfimprove_jax.language_models import chat_api, structured
from selfimprove_jax.language_models.chat_api import Prices
from selfimprove_jax.language_models.endpoint import Endpoint
from selfimprove_jax.language_models.openai_client import AttemptError, Call, with_retries
from selfimprove_jax.language_models.protocol import TextRequest
from selfimprove_jax.runs import storage

MAX_REQUESTS, MAX_BYTES = 50_000, 200 * 10**6  # per file, as OpenAI documents them
_REQUESTS, _RESULTS, _STATE = ".requests.jsonl", ".results.jsonl", ".batch.json"
_NEW = {"ledger_call": None, "file_id": None, "batch_id": None, "status": "new"}
_ENDED = {"completed", "expired", "cancelled", "failed"}
_API = "/v1"  # the first part of the paths in a request file, whatever the base URL is


@dataclasses.dataclass(frozen=True)
class BatchReport:
  """Progress of the requests in a folder.

  Attributes:
    num_requests: requests in the request files.
    num_stored: requests whose answer is in the store.
    errors: request key -> why it has no answer.
    unknown: ids in result files that no request file has.
    damaged: unreadable lines of result files, as `file:number`.
    statuses: file name -> the endpoint's status of its batch.
  """

  num_requests: int
  num_stored: int
  errors: dict[str, str]
  unknown: list[str]
  damaged: list[str]
  statuses: dict[str, str]

  @property
  def num_waiting(self) -> int:
    """Number of requests with neither an answer nor an error."""
    return self.num_requests - self.num_stored - len(self.errors)


def write_requests(
  folder: str | os.PathLike,
  requests: Iterable[TextRequest],
  *,
  model: Endpoint,
  max_requests: int = MAX_REQUESTS,
  max_bytes: int = MAX_BYTES,
) -> list[pathlib.Path]:
  """Writes the requests that are neither in the store nor in the folder; returns the new files.

  A file holds requests of one kind, chats or texts. Each request's id is its key in the store.

  Raises:
    ValueError: a single request is longer than `max_bytes`.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  known = set(_read_folder(folder))
  number = len(list(folder.glob(f"*{_REQUESTS}")))
  written: list[pathlib.Path] = []
  waiting: dict[str, list[bytes]] = collections.defaultdict(list)
  sizes: collections.Counter[str] = collections.Counter()

  def write(kind: str) -> None:
    path = folder / f"{number + len(written):05d}{_REQUESTS}"
    storage.write_atomic(path, b"".join(waiting.pop(kind)))
    del sizes[kind]
    written.append(path)

  for request in requests:
    key = model.api.key(request)
    if key in known or model.store.find(key) is not None:
      continue
    known.add(key)
    kind, body = model.api.body(request, enforce_schema=True)
    record = {"custom_id": key, "method": "POST", "url": _API + kind, "body": body}
    line = json.dumps(record).encode() + b"\n"
    if len(line) > max_bytes:
      raise ValueError(f"request {request.id!r} has {len(line)} bytes; a file holds {max_bytes}")
    if len(waiting[kind]) == max_requests or sizes[kind] + len(line) > max_bytes:
      write(kind)
    waiting[kind].append(line)
    sizes[kind] += len(line)
  for kind in list(waiting):
    write(kind)
  return written


def submit(
  folder: str | os.PathLike, *, model: Endpoint, prices: Prices, max_active: int = 8
) -> None:
  """Uploads request files and starts a batch for each.

  Each batch is entered in the ledger first, at its highest possible price, and stays there until
  `collect` has its results.

  Args:
    prices: prices of tokens in a batch.
    max_active: batches that may be active at the endpoint; later calls start the others.

  Raises:
    BudgetError: the rest of the hard cap does not cover a batch.
    EndpointError, RequestError, AttemptError: the endpoint refused or failed.
  """
  model.start(_submit(pathlib.Path(folder), model, prices, max_active)).result()


def collect(folder: str | os.PathLike, *, model: Endpoint, prices: Prices) -> BatchReport:
  """Downloads the results of finished batches and stores the answers.

  Raises:
    EndpointError, RequestError, AttemptError: the endpoint refused or failed.
  """
  folder = pathlib.Path(folder)
  statuses = model.start(_fetch(folder, model)).result()
  report = read_results(folder, model=model, prices=prices)
  for path in folder.glob(f"*{_STATE}"):
    state = json.loads(path.read_bytes())
    if state["status"] in _ENDED and state["ledger_call"] is not None:
      # Each answer has its own entry in the ledger now, so the entry of the whole batch ends.
      model.store.not_billed(state["ledger_call"])
      _write_state(path, state | {"ledger_call": None})
  return dataclasses.replace(report, statuses=statuses)


def read_results(folder: str | os.PathLike, *, model: Endpoint, prices: Prices) -> BatchReport:
  """Stores the answers in a folder's result files, which may be partial or read before.

  As in `Endpoint`, a refusal, a filtered reply and one that violates its schema are errors.
  """
  folder = pathlib.Path(folder)
  api = dataclasses.replace(model.api, prices=prices)
  requests = _read_folder(folder)
  errors: dict[str, str] = {}
  unknown, damaged = [], []
  for path in sorted(folder.glob(f"*{_RESULTS}")):
    for number, line in enumerate(_lines(path), start=1):
      try:
        result = json.loads(line)
        key = str(result["custom_id"])
      except (ValueError, KeyError, TypeError, RecursionError):
        damaged.append(f"{path.name}:{number}")
        continue
      if key not in requests:
        unknown.append(key)
        continue
      try:
        answer = api.answer(requests[key], _payload(result))
      except AttemptError as error:
        errors[key] = str(error)
        continue
      problem = chat_api.why_unusable(answer)
      if problem is None and requests[key].json_schema is not None:
        _, problem = structured.read(requests[key], answer.text)
      if problem is not None:
        # It is paid for, once however often the file is read, but is no answer to the request.
        errors[key] = problem
        key = f"{key} unusable {hashlib.sha256(line.strip()).hexdigest()}"
      model.store.add(key, answer, model=api.identity)
  stored = {key for key in requests if model.store.find(key) is not None}
  errors = {key: error for key, error in errors.items() if key not in stored}
  return BatchReport(len(requests), len(stored), errors, unknown, damaged, {})


async def _submit(folder: pathlib.Path, model: Endpoint, prices: Prices, max_active: int) -> None:
  states = [json.loads(p.read_bytes()) for p in folder.glob(f"*{_STATE}")]
  num_active = sum(s["batch_id"] is not None and s["status"] not in _ENDED for s in states)
  for requests in sorted(folder.glob(f"*{_REQUESTS}")):
    path = _sibling(requests, _STATE)
    state = json.loads(path.read_bytes()) if path.exists() else dict(_NEW)
    if state["batch_id"] is not None or _sibling(requests, _RESULTS).exists():
      continue
    if num_active >= max_active:
      return
    content = requests.read_bytes()
    checksum = hashlib.sha256(content).hexdigest()
    # The state is written after each step, so a killed run repeats at most the step it was in.
    if state["ledger_call"] is None:
      most = sum(prices.usd(model.api.most_usage(r)) for _, r in _read_requests(requests))
      state["ledger_call"] = model.store.begin(
        f"batch {checksum}", model=model.api.identity, most_usd=most, lease=False
      )
      try:
        _write_state(path, state)
      except BaseException:
        model.store.not_billed(state["ledger_call"])  # nothing was sent
        raise
    if state["file_id"] is None:
      file = (requests.name, content, "application/jsonl")
      uploaded = await _send(model, _method("files.create", file=file, purpose="batch"))
      state["file_id"] = _text(uploaded, "id")
      _write_state(path, state)
    url = json.loads(content.partition(b"\n")[0])["url"]
    start = functools.partial(_find_or_start, model, checksum, state["file_id"], url)
    batch = await with_retries(start, model.retries)
    _write_state(path, state | {"batch_id": _text(batch, "id"), "status": _text(batch, "status")})
    num_active += 1


async def _find_or_start(model: Endpoint, checksum: str, file_id: str, url: str) -> dict[str, Any]:
  """Returns the batch of these requests, or starts it.

  It exists already if an earlier run was killed before it stored the batch's id.
  """
  listed = await model.client.send_json(_method("batches.list", limit=100))
  batches = listed.get("data")
  for batch in batches if isinstance(batches, list) else []:
    with contextlib.suppress(AttributeError, TypeError, KeyError):  # not of our making
      if batch["metadata"]["requests_sha256"] == checksum:
        return batch
  create = _method(
    "batches.create",
    input_file_id=file_id,
    endpoint=url,
    completion_window="24h",
    metadata={"requests_sha256": checksum},
  )
  return await model.client.send_json(create)


async def _fetch(folder: pathlib.Path, model: Endpoint) -> dict[str, str]:
  """Downloads the results of batches that have ended; returns file name -> status."""
  statuses = {}
  for path in sorted(folder.glob(f"*{_STATE}")):
    state = json.loads(path.read_bytes())
    results = _sibling(path, _RESULTS)
    if state["batch_id"] is not None and not results.exists():
      batch = await _send(model, _method("batches.retrieve", state["batch_id"]))
      if _text(batch, "status") in _ENDED:
        files = [batch.get("output_file_id"), batch.get("error_file_id")]
        parts = [await _download(model, str(file)) for file in files if file]
        storage.write_atomic(results, b"".join(parts))
      state["status"] = batch["status"]
      _write_state(path, state)
    statuses[path.name.removesuffix(_STATE)] = state["status"]
  return statuses


async def _download(model: Endpoint, file_id: str) -> bytes:
  """Returns a file's content, ending in a newline unless it is empty."""
  call = _method("files.content", file_id)
  content = await with_retries(lambda: model.client.send(call), model.retries)
  return content if content.endswith(b"\n") or not content else content + b"\n"


async def _send(model: Endpoint, call: Call) -> dict[str, Any]:
  return await with_retries(lambda: model.client.send_json(call), model.retries)


def _method(name: str, *args: Any, **options: Any) -> Call:
  """Returns a call of one of the client's methods, such as "files.create"."""
  method = operator.attrgetter(name)
  return lambda client, headers: method(client)(*args, **options, extra_headers=headers)


def _read_folder(folder: pathlib.Path) -> dict[str, TextRequest]:
  """Returns key -> request of a folder's request files, with what results are read by."""
  paths = sorted(folder.glob(f"*{_REQUESTS}"))
  return dict(pair for path in paths for pair in _read_requests(path))


def _read_requests(path: pathlib.Path) -> Iterator[tuple[str, TextRequest]]:
  for line in _lines(path):
    record = json.loads(line)
    body = record["body"]
    form = body.get("response_format") or {"json_schema": {"schema": None}}
    is_chat = record["url"] == _API + chat_api.CHAT_PATH
    request = TextRequest(
      prompt=body["messages" if is_chat else "prompt"],
      max_tokens=body["max_tokens" if "max_tokens" in body else "max_completion_tokens"],
      top_logprobs=body.get("top_logprobs" if is_chat else "logprobs"),
      json_schema=form["json_schema"]["schema"],
    )
    yield record["custom_id"], request


def _payload(result: dict[str, Any]) -> dict[str, Any]:
  """Returns the response's JSON in a line of results.

  Raises:
    AttemptError: the line has no successful response.
  """
  response = result.get("response")
  if isinstance(response, dict):
    if response.get("status_code") == 200 and isinstance(response.get("body"), dict):
      return response["body"]
    response = response.get("body")
  said = result.get("error") or response or "no answer"
  raise AttemptError(str(said)[:300], billed=False)


def _text(payload: dict[str, Any], name: str) -> str:
  """Returns a field of a response; AttemptError if it is no text."""
  if not isinstance(payload.get(name), str) or not payload[name]:
    raise AttemptError(f"an answer without {name}: {str(payload)[:300]}", billed=False)
  return payload[name]


def _lines(path: pathlib.Path) -> Iterator[bytes]:
  with path.open("rb") as file:
    yield from file


def _sibling(path: pathlib.Path, suffix: str) -> pathlib.Path:
  """Returns a file of the same batch, which differs in its suffix."""
  name = path.name.removesuffix(_REQUESTS).removesuffix(_STATE)
  return path.with_name(name + suffix)


def _write_state(path: pathlib.Path, state: dict[str, Any]) -> None:
  storage.write_atomic(path, (json.dumps(state, indent=1) + "\n").encode())
