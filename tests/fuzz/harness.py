"""The loop of all fuzzers, and the damages that fit any file.

A fuzzer is a function `try_seed(seed) -> str | None`: it makes one input from the seed, gives it to
the reader, and returns a line that tells what is wrong, None if nothing is. An exception that
escapes it is a failure too, as is an input that takes longer than `HANG_SECONDS`.
"""

import argparse
import contextlib
import json
import pathlib
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

HANG_SECONDS = 20


def main(description: str, opened: Callable[[], contextlib.AbstractContextManager]) -> None:
  """Fuzzes for `--minutes` from `--seed`, prints the failures, and exits with 1 if there are any.

  Args:
    opened: returns a context that yields the fuzzer.
  """
  parser = argparse.ArgumentParser(description=description.splitlines()[0])
  parser.add_argument("--minutes", type=float, default=10.0)
  parser.add_argument("--seed", type=int, default=0, help="the first; the next inputs count up")
  arguments = parser.parse_args()
  with opened() as try_seed:
    tried, failed = fuzz(try_seed, arguments.seed, 60 * arguments.minutes)
  print(f"{tried} inputs tried, {len(failed)} failures")
  for line in failed:
    print(line)
  sys.exit(1 if failed else 0)


def fuzz(
  try_seed: Callable[[int], str | None], first_seed: int, seconds: float
) -> tuple[int, list[str]]:
  """Tries inputs for some seconds; returns their number and a line for each failure."""
  tried, failed = 0, []
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    seed = first_seed + tried
    tried += 1
    try:
      with _limited(HANG_SECONDS):
        wrong = try_seed(seed)
    except Exception as error:
      wrong = f"{type(error).__name__}: {str(error)[:300]}"
    if wrong is not None:
      failed.append(f"--seed {seed}: {wrong}")
  return tried, failed


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
  def hang(signum: int, frame: Any) -> None:
    raise TimeoutError(f"no end after {seconds} seconds")

  before = signal.signal(signal.SIGALRM, hang)
  signal.alarm(seconds)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def bounded_memory(more_bytes: int) -> Iterator[None]:
  """Makes allocations fail with MemoryError that need so much more than the process has now."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  limits = resource.getrlimit(resource.RLIMIT_AS)
  now = pages * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_AS, limits)


def damage(rng: random.Random, data: bytes) -> bytes:
  """Returns the bytes of a file after one damage of a random kind."""
  return rng.choice(_DAMAGES)(rng, data)


def flip(rng: random.Random, data: bytes) -> bytes:
  """Flips one bit."""
  changed = bytearray(data or b"\0")
  changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
  return bytes(changed)


def cut(rng: random.Random, data: bytes) -> bytes:
  """Cuts the end off, at any byte."""
  return data[: rng.randrange(len(data) + 1)]


def insert(rng: random.Random, data: bytes) -> bytes:
  """Inserts a byte that readers of text stumble over."""
  at = rng.randrange(len(data) + 1)
  inserted = rng.choice([b"\xff", b"\0", b"\n", b"{", b'"', b"\xc3\x28", b" ", b"9"])
  return data[:at] + inserted + data[at:]


def edit(rng: random.Random, data: bytes) -> bytes:
  """Changes one value of a JSON file, or of one line of JSON lines, as an editor would."""
  lines = data.split(b"\n") if data.count(b"\n{") else [data]
  at = rng.randrange(len(lines))
  try:
    value = json.loads(lines[at])
  except (ValueError, RecursionError):  # an earlier damage
    return data + b" "
  whole = len(lines) == 1
  text = json.dumps(edit_value(rng, value), indent=1 if whole else None, sort_keys=whole)
  lines[at] = text.encode() + (b"\n" if whole else b"")
  return b"\n".join(lines)


def edit_value(rng: random.Random, value: Any) -> Any:
  """Returns a JSON value with one of its leaves, or one of its keys, changed."""
  if isinstance(value, dict) and value:
    key = rng.choice(sorted(value))
    if rng.random() < 0.1:
      return {(k + "x" if k == key else k): v for k, v in value.items()}
    if rng.random() < 0.1:
      return {k: v for k, v in value.items() if k != key}
    return {**value, key: edit_value(rng, value[key])}
  if isinstance(value, list) and value and rng.random() < 0.7:
    at = rng.randrange(len(value))
    return [*value[:at], edit_value(rng, value[at]), *value[at + 1 :]]
  if isinstance(value, str) and value and rng.random() < 0.5:
    return value[:-1] + ("0" if value[-1] != "0" else "1")
  if isinstance(value, int) and rng.random() < 0.5:
    return value + 1
  return rng.choice([None, [], {}, "x", -1, 2**70, 1.5, float("nan"), ["a"], {"a": 1}])


_DAMAGES: list[Callable[[random.Random, bytes], bytes]] = [
  flip,
  cut,
  insert,
  edit,
  lambda rng, data: rng.randbytes(rng.randrange(200)),
  lambda rng, data: data + data,
  lambda rng, data: b"[" * 100_000,
  lambda rng, data: rng.choice([b"{}", b"{}\n", b"[]", b"null\n", b"1e999", b'"x"', b""]),
]
