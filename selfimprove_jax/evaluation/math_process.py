"""`math-verify` in processes that can be killed.

A comparison of expressions may take for ever (9^9^9^9), and the library's own time limit works in a
process's main thread alone. So it runs without one, in a process of its own that reads pairs as
JSON lines and answers each with a line; one that is late is killed, and another goes on.

  python -m selfimprove_jax.evaluation.math_process
"""

import concurrent.futures
import importlib.util
import json
import logging
import os
import queue
import selectors
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_START_SECONDS = 120.0  # to import sympy, on a busy machine
_MEMORY_BYTES = 4 * 2**30
_READY = "ready"


def check_installed() -> None:
  """Raises:
  ValueError: math-verify is not installed.
  """
  for name in ("math_verify", "antlr4"):
    if importlib.util.find_spec(name) is None:
      raise ValueError(
        f"the checker 'math_verify' needs the package {name}: pip install 'selfimprove_jax[math]'; "
        f"or choose the checker 'numbers', where every right answer is a number"
      )


def compare(
  pairs: Sequence[tuple[str, str]], *, timeout_seconds: float, num_processes: int
) -> list[str]:
  """`equal`, `different`, `timeout` or `error` for each pair of a right answer and another.

  The right one comes first: math-verify does not treat the two alike.

  Args:
    timeout_seconds: wall-clock time of one comparison.

  Raises:
    ValueError: math-verify is not installed.
    RuntimeError: a process of it does not start.
  """
  if not pairs:
    return []
  check_installed()
  workers: queue.Queue[_Worker] = queue.Queue()
  num_workers = min(num_processes, len(pairs))
  for _ in range(num_workers):
    workers.put(_Worker())

  def one(pair: tuple[str, str]) -> str:
    worker = workers.get()
    try:
      return worker.compare(*pair, timeout_seconds=timeout_seconds)
    finally:
      workers.put(worker)

  try:
    with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
      return list(pool.map(one, pairs))
  finally:
    while not workers.empty():
      workers.get().stop()


class _Worker:
  """One process, started when it is needed."""

  def __init__(self):
    self._process: subprocess.Popen | None = None

  def compare(self, gold: str, answer: str, *, timeout_seconds: float) -> str:
    if self._process is None:
      self._start()
    try:
      self._process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
      self._process.stdin.flush()
    except BrokenPipeError:
      line = b""
    else:
      line = self._read(timeout_seconds)
    if line:
      return json.loads(line)
    self.stop()
    return "timeout" if line is None else "error"

  def _start(self) -> None:
    self._process = subprocess.Popen(
      [sys.executable, "-m", __name__],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
    )
    line = self._read(_START_SECONDS)
    if not line or json.loads(line) != _READY:
      self.stop()
      raise RuntimeError(f"`python -m {__name__}` does not start; run it to see why")

  def _read(self, timeout_seconds: float) -> bytes | None:
    """A line; None if there is none in time, empty if the process has ended."""
    with selectors.DefaultSelector() as selector:
      selector.register(self._process.stdout, selectors.EVENT_READ)
      return self._process.stdout.readline() if selector.select(timeout_seconds) else None

  def stop(self) -> None:
    if self._process is not None:
      self._process.kill()
      self._process.wait()
      self._process.stdin.close()
      self._process.stdout.close()
      self._process = None


def main() -> None:
  """Answers pairs from standard input until it is closed."""
  import resource

  resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # what a library prints is no answer
  logging.disable(logging.CRITICAL)

  import math_verify

  configs = [math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()]

  def parse(text: str) -> list[Any]:
    boxed = f"\\boxed{{{text}}}"  # else only what stands between dollars is read as LaTeX
    return math_verify.parse(boxed, configs, parsing_timeout=None, raise_on_error=True)

  answers.write(json.dumps(_READY) + "\n")
  for line in sys.stdin:
    gold, answer = json.loads(line)
    try:
      same = math_verify.verify(
        parse(gold), parse(answer), timeout_seconds=None, raise_on_error=True
      )
    except Exception:
      result = "error"
    else:
      result = "equal" if same else "different"
    answers.write(json.dumps(result) + "\n")


if __name__ == "__main__":
  main()
