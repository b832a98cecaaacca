"""Requests per second of the synthesis's calls, against datatrove's inference runner.

  pip install datatrove==0.10.1 -e '.[endpoint]'
  python tools/bench_calls.py

A server in a process of its own answers every chat completion after 5 ms. Ours is
`synthesis.calls.answer` on an `Endpoint`: each answer is stored with its price, and appended to the
log, before the next record. The peer is `InferenceRunner` with its local checkpoints, which keep
each answer too. Both send the same prompts with the same number of calls in flight, from one
process, in alternating turns. The floor is the calls in flight over the server's 5 ms. Prints a
table; the last line is a JSON object whose `ratio` is our requests per second over the peer's.
"""

import argparse
import asyncio
import json
import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import bench_common
import numpy as np
from bench_train import spread

from selfimprove_jax.data.sources import SourceDocument
from selfimprove_jax.language_models.chat_api import Prices
from selfimprove_jax.language_models.endpoint import Endpoint
from selfimprove_jax.language_models.openai_client import Limits
from selfimprove_jax.language_models.store import CallStore
from selfimprove_jax.synthesis import calls
from selfimprove_jax.synthesis.prompts import PromptSet
from selfimprove_jax.synthesis.records import GenerationConfig
from selfimprove_jax.synthesis.synthesizer import Synthesizer
from selfimprove_jax.synthesis.units import Unit

_ANSWER_SECONDS = 0.005
_TEXT = "The mill and the river belong together, as the document says. " * 20


def serve(port: Any) -> None:
  """Answers chat completions after a pause; connections stay open unless the client closes them."""
  choice = {"index": 0, "message": {"role": "assistant", "content": _TEXT}, "finish_reason": "stop"}
  usage = {"prompt_tokens": 100, "completion_tokens": 240, "total_tokens": 340}
  reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": usage}
  body = json.dumps(reply | {"choices": [choice]}).encode()
  head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
  answer = f"{head}{len(body)}\r\n\r\n".encode() + body

  async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
      while True:
        header = await reader.readuntil(b"\r\n\r\n")
        lengths = [line for line in header.lower().split(b"\r\n") if b"content-length" in line]
        if lengths:
          await reader.readexactly(int(lengths[0].split(b":")[1]))
        await asyncio.sleep(_ANSWER_SECONDS)
        writer.write(answer)
        await writer.drain()
        if b"connection: close" in header.lower():
          break
      writer.close()
    except (asyncio.IncompleteReadError, ConnectionError):
      writer.close()

  async def run() -> None:
    server = await asyncio.start_server(connection, "127.0.0.1", 0, backlog=4096)
    port.value = server.sockets[0].getsockname()[1]
    await server.serve_forever()

  asyncio.run(run())


def units(number: int) -> list[Unit]:
  return [Unit("mill", "pair", (f"the mill {i}", "the river")) for i in range(number)]


def ours(url: str, number: int, concurrent: int) -> float:
  """Returns the seconds of our calls."""
  source = SourceDocument("mill", "The mill", "", "", "The mill stands on the river. " * 10, ())
  prompts = PromptSet.load("default")
  synthesizer = Synthesizer([source], prompts, GenerationConfig(), "m")
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    model = Endpoint(
      f"{url}/v1",
      "m",
      store=CallStore(root / "calls.sqlite", max_usd=1000.0),
      prices=Prices(1.0, 1.0),
      api_key_env=None,
      limits=Limits(max_concurrent=concurrent),
    )
    began = time.perf_counter()
    counts = calls.answer(
      units(number),
      model=model,
      make_request=synthesizer.make_request,
      read=synthesizer.read,
      log_path=root / "log.jsonl",
      max_attempts=1,
    )
    seconds = time.perf_counter() - began
    model.close()
  if counts.num_records != number or counts.num_failures:
    raise RuntimeError(f"{number} units gave {counts}")
  return seconds


def peer(url: str, number: int, concurrent: int, messages: list[list[dict[str, Any]]]) -> float:
  """Returns the seconds of datatrove's runner, from its first document to its last."""
  from datatrove.data import Document
  from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
  from datatrove.pipeline.writers import JsonlWriter

  async def rollout(document: Document, generate: Any) -> Any:
    result = await generate({"messages": messages[int(document.id)], "max_tokens": 2048})
    return result.text

  def documents() -> Iterator[Document]:
    for index in range(number):
      yield Document(text="x", id=str(index))

  with tempfile.TemporaryDirectory() as folder:
    runner = InferenceRunner(
      rollout_fn=rollout,
      config=InferenceConfig(
        server_type="endpoint",
        model_name_or_path="m",
        endpoint_url=url,
        max_concurrent_generations=concurrent,
        metric_interval=10**6,
      ),
      output_writer=JsonlWriter(f"{folder}/out", output_filename="${rank}_${chunk_index}.jsonl"),
      checkpoints_local_dir=f"{folder}/checkpoints",
      records_per_chunk=number,
    )
    began = time.perf_counter()
    runner.run(documents(), 0, 1)
    seconds = time.perf_counter() - began
    written = sum(
      len(path.read_bytes().splitlines())
      for path in pathlib.Path(folder, "out").rglob("*.jsonl*")
      if path.suffix == ".jsonl"
    )
  if written not in (0, number):  # compressed files are not counted
    raise RuntimeError(f"datatrove wrote {written} of {number} records")
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--requests", type=int, default=2000, help="calls of a turn")
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--concurrent", type=int, default=32, help="calls in flight")
  bench_common.add_flag(parser)
  arguments = parser.parse_args()
  machine = bench_common.begin(arguments.wait_seconds)
  port = multiprocessing.get_context("spawn").Value("i", 0)
  server = multiprocessing.get_context("spawn").Process(target=serve, args=(port,), daemon=True)
  server.start()
  while not port.value:
    time.sleep(0.05)
  url = f"http://127.0.0.1:{port.value}"
  number, concurrent = arguments.requests, arguments.concurrent
  source = SourceDocument("mill", "The mill", "", "", "The mill stands on the river. " * 10, ())
  synthesizer = Synthesizer([source], PromptSet.load("default"), GenerationConfig(), "m")
  messages = [[dict(m) for m in synthesizer.make_request(u, 0).prompt] for u in units(number)]
  ours(url, 100, concurrent), peer(url, 100, concurrent, messages)
  turns = []
  for turn in range(arguments.turns):
    bench_common.note(f"turn {turn + 1} of {arguments.turns}")
    turns.append((ours(url, number, concurrent), peer(url, number, concurrent, messages)))
  rates = number / np.array(turns)
  ratio = spread(rates[:, 0] / rates[:, 1])
  floor = concurrent / _ANSWER_SECONDS
  medians = [float(x) for x in np.median(rates, axis=0)]
  print(f"{'ours /s':>9} {'datatrove /s':>13} {'floor /s':>9}  ratio")
  print(
    f"{medians[0]:>9,.0f} {medians[1]:>13,.0f} {floor:>9,.0f}  "
    f"{ratio['median']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f})"
  )
  summary = {"ratio": ratio["median"], "spread": ratio, "what": "synthesis calls per second"}
  sizes = {"requests": number, "concurrent": concurrent, "calls_per_second": medians}
  print(json.dumps(summary | sizes | {"machine": machine}))
  server.terminate()


if __name__ == "__main__":
  main()
