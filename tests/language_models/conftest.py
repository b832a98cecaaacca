"""An OpenAI-compatible server on a free port whose behavior a test sets."""

import dataclasses
import http.server
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from selfimprove_jax.language_models import TextRequest
from selfimprove_jax.language_models.chat_api import Prices
from selfimprove_jax.language_models.endpoint import Endpoint
from selfimprove_jax.language_models.openai_client import Limits, Retries, Timeouts
from selfimprove_jax.language_models.store import CallStore

PRICES = Prices(input_per_million=1.0, output_per_million=2.0)


@dataclasses.dataclass(frozen=True)
class Call:
  """A request that reached the server."""

  number: int
  path: str
  body: Any
  headers: dict[str, str]
  time: float

  @property
  def asked(self) -> str:
    """The content of the last message, or the prompt."""
    return self.body["prompt"] if "prompt" in self.body else self.body["messages"][-1]["content"]


@dataclasses.dataclass(frozen=True)
class Said:
  """A response: sent after `wait` seconds, and cut to its first `cut` bytes."""

  body: Any
  status: int = 200
  headers: dict[str, str] = dataclasses.field(default_factory=dict)
  wait: float = 0.0
  cut: int | None = None


def say(text: str, *, tokens=(10, 5), reason="stop", **options) -> Said:
  """A response that is valid for chats and for completions."""
  choice = {"index": 0, "message": {"role": "assistant", "content": text}, "text": text}
  body = {"id": "x", "choices": [choice | {"finish_reason": reason}]}
  if tokens is not None:
    body["usage"] = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
  return Said(body, **options)


class Server:
  """Records its calls; `behave` maps a call to its response."""

  def __init__(self):
    self.calls: list[Call] = []
    self.behave: Callable[[Call], Said] = lambda call: say(f"{call.asked}!")
    self.most_at_once = 0
    self._at_once = 0
    self._lock = threading.Lock()
    server = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        is_json = self.headers.get("Content-Type") == "application/json"
        self._answer(json.loads(content) if is_json else content)

      def do_GET(self):
        self._answer(None)

      def _answer(self, body):
        with server._lock:
          headers = {k.lower(): v for k, v in self.headers.items()}
          call = Call(len(server.calls), self.path, body, headers, time.monotonic())
          server.calls.append(call)
          server._at_once += 1
          server.most_at_once = max(server.most_at_once, server._at_once)
        try:
          said = server.behave(call)
          time.sleep(said.wait)
        finally:
          with server._lock:
            server._at_once -= 1
        data = said.body if isinstance(said.body, bytes) else json.dumps(said.body).encode()
        try:
          self.send_response(said.status)
          for name, value in said.headers.items():
            self.send_header(name, value)
          self.send_header("Content-Length", str(len(data)))
          self.end_headers()
          self.wfile.write(data[: said.cut])
        except ConnectionError:  # the client has given up
          self.close_connection = True
        if said.cut is not None:
          self.close_connection = True

      def log_message(self, *args):
        pass

    class Threads(http.server.ThreadingHTTPServer):
      request_queue_size = 256
      daemon_threads = True

      def handle_error(self, request, client_address):
        pass

    self._http = Threads(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
    self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
    self._thread.start()

  def close(self):
    self._http.shutdown()
    self._http.server_close()
    self._thread.join()


@pytest.fixture
def server():
  server = Server()
  yield server
  server.close()


@pytest.fixture
def store(tmp_path):
  store = CallStore(tmp_path / "calls.sqlite", max_usd=None)
  yield store
  store.close()


@pytest.fixture
def make_model(server, store):
  """Makes endpoints at the server, with short timeouts and no key by default."""
  models = []

  def make(**options) -> Endpoint:
    settings = {
      "store": store,
      "prices": PRICES,
      "api_key_env": None,
      "limits": Limits(max_concurrent=8),
      "retries": Retries(max_attempts=3, initial_seconds=0.01, max_seconds=0.02),
      "timeouts": Timeouts(connect=5.0, read=5.0, total=10.0),
    }
    models.append(Endpoint(server.url, "some-model", **settings | options))
    return models[-1]

  yield make
  for model in models:
    model.close()


@pytest.fixture
def ask():
  """Makes requests of one message."""

  def make(text: str = "hello", **options) -> TextRequest:
    settings = {"max_tokens": 100, "id": text}
    return TextRequest(prompt=[{"role": "user", "content": text}], **settings | options)

  return make


@pytest.fixture
def said():
  """Makes responses from a raw body."""
  return Said


@pytest.fixture
def says():
  return say
