"""Requests as files of OpenAI's Batch API, at about half the price, and their results.

  write_requests("batch", requests, model=model)
  submit("batch", model=model, prices=half)          # or upload the files by other means
  report = collect("batch", model=model, prices=half)    # again and again, until all are done
  for reply in model.generate(requests): ...         # from the store; what failed is asked anew

A folder holds NAME.requests.jsonl, NAME.results.jsonl (put there by `collect`, or by hand) and
NAME.batch.json, the numbers that the endpoint gave to file and batch. Each function does what is
left to do: to go on is to call it again.
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from selfimprove_jax import storage
from selfimprove_jax.language_models import chat_api
from selfimprove_jax.language_models.chat_api import Prices
from selfimprove_jax.language_models.endpoint import Endpoint
from selfimprove_jax.language_models.protocol import TextRequest
from selfimprove_jax.language_models.transport import AttemptError, with_retries

MAX_REQUESTS, MAX_BYTES = 50_000, 200 * 10**6  # of a file, as OpenAI documents them
_REQUESTS, _RESULTS, _STATE = ".requests.jsonl", ".results.jsonl", ".batch.json"
_ENDED = {"completed", "expired", "cancelled", "failed"}
_API = "/v1"  # how the paths in a request file begin, whatever the base URL is


@dataclasses.dataclass(frozen=True)
class BatchReport:
  """What has come of the requests in a folder.

  Attributes:
    num_requests: in its request files.
    num_stored: of them, answered and in the store.
    errors: by request key, why it was not answered.
    unknown: ids in results that no request file has.
    damaged: lines of results that can't be read, as `file:number`.
    statuses: by file name, what the endpoint says of its batch.
  """

  num_requests: int
  num_stored: int
  errors: dict[str, str]
  unknown: list[str]
  damaged: list[str]
  statuses: dict[str, str]

  @property
  def num_waiting(self) -> int:
    """Requests with neither an answer nor an error."""
    return self.num_requests - self.num_stored - len(self.errors)


def write_requests(
  folder: str | os.PathLike,
  requests: Iterable[TextRequest],
  *,
  model: Endpoint,
  max_requests: int = MAX_REQUESTS,
  max_bytes: int = MAX_BYTES,
) -> list[pathlib.Path]:
  """Writes those requests that are neither in the store nor in the folder; gives the new files.

  A file holds requests of one kind, chats or bare texts, each under its key in the store.

  Raises:
    ValueError: a request alone is longer than `max_bytes`.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  known = set(_asked(folder))
  number = len(list(folder.glob(f"*{_REQUESTS}")))
  written: list[pathlib.Path] = []
  waiting: dict[str, list[bytes]] = collections.defaultdict(list)
  sizes: dict[str, int] = collections.defaultdict(int)

  def write(kind):
    path = folder / f"{number + len(written):05d}{_REQUESTS}"
    storage.write_atomic(path, b"".join(waiting.pop(kind)))
    del sizes[kind]
    written.append(path)

  for request in requests:
    key = model.api.key(request)
    if key in known or model.store.find(key) is not None:
      continue
    known.add(key)
    path, body = model.api.body(request, enforce_schema=True)
    record = {"custom_id": key, "method": "POST", "url": _API + path, "body": body}
    line = json.dumps(record).encode() + b"\n"
    if len(line) > max_bytes:
      raise ValueError(f"request {request.id!r} has {len(line)} bytes; a file holds {max_bytes}")
    if len(waiting[path]) == max_requests or sizes[path] + len(line) > max_bytes:
      write(path)
    waiting[path].append(line)
    sizes[path] += len(line)
  for path in list(waiting):
    write(path)
  return written


def submit(
  folder: str | os.PathLike, *, model: Endpoint, prices: Prices, max_active: int = 8
) -> None:
  """Uploads the request files and starts their batches, at most `max_active` at a time.

  The most that a batch may cost is in the ledger until its results are there.

  Raises:
    BudgetError: it is more than is left of the hard cap.
    EndpointError, AttemptError, RequestError: of `transport`.
  """
  folder = pathlib.Path(folder)
  model.start(_submit(folder, model, prices, max_active)).result()


def collect(folder: str | os.PathLike, *, model: Endpoint, prices: Prices) -> BatchReport:
  """Fetches the results of batches that have ended, and stores all results in the folder.

  Args:
    prices: of a batch's tokens.

  Raises:
    EndpointError, AttemptError, RequestError: of `transport`.
  """
  folder = pathlib.Path(folder)
  statuses = model.start(_fetch(folder, model)).result()
  report = read_results(folder, model=model, prices=prices)
  for path in sorted(folder.glob(f"*{_STATE}")):
    state = json.loads(path.read_bytes())
    if state["status"] in _ENDED and state["ledger_call"] is not None:
      # Each of its answers has a line in the ledger now.
      model.store.not_billed(state["ledger_call"])
      _write_state(path, state | {"ledger_call": None})
  return dataclasses.replace(report, statuses=statuses)


def read_results(folder: str | os.PathLike, *, model: Endpoint, prices: Prices) -> BatchReport:
  """Stores what the result files in a folder hold; a file may be read again, or be a part.

  Args:
    prices: of a batch's tokens.
  """
  folder = pathlib.Path(folder)
  api = dataclasses.replace(model.api, prices=prices)
  asked = _asked(folder)
  errors: dict[str, str] = {}
  unknown, damaged = [], []
  for path in sorted(folder.glob(f"*{_RESULTS}")):
    with path.open("rb") as file:
      for number, line in enumerate(file, start=1):
        try:
          result = json.loads(line)
          key = result["custom_id"]
        except (ValueError, KeyError, TypeError):
          damaged.append(f"{path.name}:{number}")
          continue
        if key not in asked:
          unknown.append(str(key))
          continue
        try:
          answer = api.answer(asked[key], _payload(result))
        except AttemptError as error:
          errors[key] = str(error)
        else:
          model.store.add(key, answer, model=api.identity)
  stored = {key for key in asked if model.store.find(key) is not None}
  errors = {key: error for key, error in errors.items() if key not in stored}
  return BatchReport(len(asked), len(stored), errors, unknown, damaged, {})


async def _submit(folder, model, prices, max_active):
  states = [json.loads(p.read_bytes()) for p in folder.glob(f"*{_STATE}")]
  num_active = sum(s["batch_id"] is not None and s["status"] not in _ENDED for s in states)
  for requests in sorted(folder.glob(f"*{_REQUESTS}")):
    path = _beside(requests, _STATE)
    state = {"ledger_call": None, "file_id": None, "batch_id": None, "status": "new"}
    if path.exists():
      state = json.loads(path.read_bytes())
    if state["batch_id"] is not None or _beside(requests, _RESULTS).exists():
      continue
    if num_active >= max_active:
      return
    content = requests.read_bytes()
    checksum = hashlib.sha256(content).hexdigest()
    if state["ledger_call"] is None:
      most = sum(prices.usd(model.api.most_usage(r)) for _, r in _read_requests(requests))
      name = f"batch {checksum}"
      state["ledger_call"] = model.store.begin(name, model=model.api.identity, most_usd=most)
      _write_state(path, state)
    if state["file_id"] is None:
      file = {"file": (requests.name, content, "application/jsonl")}
      uploaded = await _call(model, "POST", "/files", data={"purpose": "batch"}, files=file)
      state["file_id"] = uploaded["id"]
      _write_state(path, state)
    url = json.loads(content.partition(b"\n")[0])["url"]
    batch = await _find_or_start(model, checksum, state["file_id"], url)
    _write_state(path, state | {"batch_id": batch["id"], "status": batch["status"]})
    num_active += 1


async def _find_or_start(model, checksum, file_id, url):
  """A batch of these requests: one whose number was lost by a run that was killed, or a new one."""

  async def attempt():
    listed = await model.transport.send_json("GET", "/batches", params={"limit": 100})
    for batch in listed["data"]:
      if (batch.get("metadata") or {}).get("requests_sha256") == checksum:
        return batch
    body = {
      "input_file_id": file_id,
      "endpoint": url,
      "completion_window": "24h",
      "metadata": {"requests_sha256": checksum},
    }
    return await model.transport.send_json("POST", "/batches", json=body)

  return await with_retries(attempt, model.retries)


async def _fetch(folder, model):
  statuses = {}
  for path in sorted(folder.glob(f"*{_STATE}")):
    state = json.loads(path.read_bytes())
    results = path.with_name(path.name.removesuffix(_STATE) + _RESULTS)
    if state["batch_id"] is not None and not results.exists():
      batch = await _call(model, "GET", f"/batches/{state['batch_id']}")
      if batch["status"] in _ENDED:
        files = [batch.get("output_file_id"), batch.get("error_file_id")]
        parts = [await _download(model, file) for file in files if file]
        storage.write_atomic(results, b"".join(parts))
      state["status"] = batch["status"]
      _write_state(path, state)
    statuses[path.name.removesuffix(_STATE)] = state["status"]
  return statuses


async def _download(model, file_id):
  path = f"/files/{file_id}/content"
  content = await with_retries(lambda: model.transport.send("GET", path), model.retries)
  return content if content.endswith(b"\n") or not content else content + b"\n"


async def _call(model, method, path, **options):
  return await with_retries(
    lambda: model.transport.send_json(method, path, **options), model.retries
  )


def _asked(folder) -> dict[str, TextRequest]:
  """By key, what the request files of a folder ask; only its prompt and length are as they were."""
  return dict(
    pair for path in sorted(folder.glob(f"*{_REQUESTS}")) for pair in _read_requests(path)
  )


def _read_requests(path) -> Iterator[tuple[str, TextRequest]]:
  with path.open("rb") as file:
    for line in file:
      record = json.loads(line)
      body: dict[str, Any] = record["body"]
      chat = record["url"] == _API + chat_api.CHAT_PATH
      field = "max_tokens" if "max_tokens" in body else "max_completion_tokens"
      yield (
        record["custom_id"],
        TextRequest(prompt=body["messages"] if chat else body["prompt"], max_tokens=body[field]),
      )


def _payload(result):
  """The answer in a line of results.

  Raises:
    AttemptError: it holds none.
  """
  response = result.get("response") or {}
  if response.get("status_code") == 200 and isinstance(response.get("body"), dict):
    return response["body"]
  said = result.get("error") or response.get("body") or "no answer"
  raise AttemptError(str(said)[:300], billed=False)


def _beside(requests, suffix):
  return requests.with_name(requests.name.removesuffix(_REQUESTS) + suffix)


def _write_state(path, state):
  storage.write_atomic(path, (json.dumps(state, indent=1) + "\n").encode())
