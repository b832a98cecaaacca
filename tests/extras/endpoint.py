"""Checks the extra `endpoint` in an environment that has nothing else, against a local server."""

import http.server
import importlib.util
import json
import pathlib
import tempfile
import threading

from selfimprove_jax.language_models.chat_api import Prices
from selfimprove_jax.language_models.endpoint import Endpoint
from selfimprove_jax.language_models.protocol import TextRequest
from selfimprove_jax.language_models.store import CallStore


class _Server(http.server.BaseHTTPRequestHandler):
  """Answers every chat with one JSON value."""

  def do_POST(self) -> None:
    self.rfile.read(int(self.headers["Content-Length"]))
    content = json.dumps({"answer": "Paris"})
    body = {
      "id": "1",
      "object": "chat.completion",
      "created": 0,
      "model": "m",
      "choices": [
        {
          "index": 0,
          "finish_reason": "stop",
          "message": {"role": "assistant", "content": content},
        }
      ],
      "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }
    data = json.dumps(body).encode()
    self.send_response(200)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *_: object) -> None:
    pass


def main() -> None:
  for package in ("torch", "fastapi", "gguf"):
    assert importlib.util.find_spec(package) is None, f"{package} is installed: not a clean check"
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  schema = {
    "type": "object",
    "properties": {"answer": {"type": "string"}},
    "required": ["answer"],
  }
  request = TextRequest(
    prompt=[{"role": "user", "content": "The capital of France?"}],
    max_tokens=20,
    json_schema=schema,
  )
  with tempfile.TemporaryDirectory() as folder:
    store = CallStore(pathlib.Path(folder) / "calls.sqlite", max_usd=1.0)
    model = Endpoint(
      f"http://127.0.0.1:{server.server_port}/v1",
      "m",
      store=store,
      prices=Prices(input_per_million=1.0, output_per_million=1.0),
      api_key_env=None,
    )
    [reply] = model.generate([request])
    [again] = model.generate([request])
    model.close()
    store.close()
  server.shutdown()
  assert reply.error is None and reply.parsed == {"answer": "Paris"}, reply
  assert again.cached and not reply.cached
  print("endpoint: a request with a JSON schema was answered, and its repetition cached")


if __name__ == "__main__":
  main()
