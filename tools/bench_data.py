"""Measures packing and loading of training rows, next to grain doing the same.

  python tools/bench_data.py                      # about three minutes on two idle cores
  python tools/bench_data.py --seq_lens 4096 --repeats 9

Tokenizes and packs docstrings of the installed packages in a temporary folder. Then it measures,
with ours and grain's runs alternating:

- packing: `packing.pack` against `grain.experimental.BestFitPackIterDataset` on the same examples
  (best fit, the same number of open rows, long examples already cut), and packing with writing;
- loading: `Mixture.iterate` of three components against grain's shuffle, repeat, mix and batch over
  its `ArrayRecordDataSource`. grain reads rows stored as plain arrays, which is its best case, and
  in a second column our own files, one row at a time;
- waiting: the share of time that a step of known length (it sleeps) waits for its batch.

On a busy machine, use `--clock cpu`, which counts only the CPU time of this process.

Prints the speed of each part of loading, a table of medians and ranges over the repeats, and as the
last line one JSON object. Its `ratio` is our rate of loading divided by grain's (plain
arrays) at the longest rows, the median over neighboring runs.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import bench_common
import grain
import numpy as np
import zstandard
from array_record.python import array_record_module
from grain import experimental as grain_experimental

from selfimprove_jax.data import corpora, mixture, packing, rows, tokenizer

WEIGHTS = (0.5, 0.3, 0.2)
TARGETS = {"load": 5e6, "pack": 1e6}  # tokens/s
STEP_TOKENS_PER_SECOND = 2.5e6  # speed of the simulated step
NUM_OPEN_ROWS = 32
OUTPUT_BYTES = 13  # per token of a batch: three int32 and a bool
READING, DECODING = "ArrayRecord: reading in any order", "decoding to batches"
PEER_OPTIONS = "group_size:1,zstd:3,max_parallelism:1"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Case = Callable[[], float]
Clock = Callable[[], float]


def read_texts(packages: Sequence[str], num_chars: int) -> list[str]:
  """Returns the first docstrings of the packages, up to `num_chars` in total."""
  texts, seen = [], 0
  config = corpora.DocstringsConfig(packages=tuple(packages), min_chars=200)
  for document in corpora.read_documents(config):
    texts.append(document.text)
    seen += len(document.text)
    if seen >= num_chars:
      break
  return texts


def in_turns(cases: dict[str, Case], repeats: int) -> dict[str, list[float]]:
  """Runs every case `repeats` times, in alternating order, so that drift cancels out."""
  found: dict[str, list[float]] = {name: [] for name in cases}
  for repeat in range(repeats):
    for name in list(cases)[:: -1 if repeat % 2 else 1]:
      found[name].append(cases[name]())
  return found


def timed(num_tokens: int, run: Callable[[], Any], clock: Clock) -> Case:
  """Returns a case that measures tokens/s of a function that processes `num_tokens`."""

  def case() -> float:
    began = clock()
    run()
    return num_tokens / (clock() - began)

  return case


def rate(tokens_of_items: Iterator[int], seconds: float, clock: Clock) -> float:
  """Measures tokens/s for some seconds; the first item, which opens files, does not count."""
  next(tokens_of_items)
  began, tokens = clock(), 0
  for count in tokens_of_items:
    tokens += count
    if clock() - began > seconds:
      break
  return tokens / (clock() - began)


def pieces(examples: Sequence[packing.Example], seq_len: int) -> list[packing.Example]:
  """Cuts examples to the length of a row, as `packing.pack` does."""
  return [
    packing.Example(e.tokens[i : i + seq_len], e.loss_mask[i : i + seq_len])
    for e in examples
    for i in range(0, len(e.tokens), seq_len)
    if len(e.tokens) - i > 1
  ]


def packing_cases(
  examples: Sequence[packing.Example], seq_len: int, pad_id: int, folder: pathlib.Path, clock: Clock
) -> tuple[dict[str, Case], dict[str, float]]:
  """Returns cases that measure tokens/s, and the share of padding of each packer."""
  num_tokens = sum(len(example.tokens) for example in examples)

  def ours():
    return packing.pack(examples, seq_len=seq_len, pad_id=pad_id, num_open_rows=NUM_OPEN_ROWS)

  def grains():
    elements = [{"tokens": e.tokens, "loss_mask": e.loss_mask} for e in examples]
    return grain_experimental.BestFitPackIterDataset(
      grain.MapDataset.source(elements).to_iter_dataset(grain.ReadOptions(num_threads=0)),
      length_struct={"tokens": seq_len, "loss_mask": seq_len},
      num_packing_bins=NUM_OPEN_ROWS,
      shuffle_bins=False,
    )

  def count(rows_) -> int:
    return sum(1 for _ in rows_)

  padding = {
    name: 1 - num_tokens / (count(make()) * seq_len)
    for name, make in (("ours", ours), ("grain", grains))
  }
  cases = {
    "ours": lambda: count(ours()),
    "grain": lambda: count(grains()),
    "ours, with writing": lambda: rows.write_rows(folder / "written", ours()),
  }
  return {name: timed(num_tokens, run, clock) for name, run in cases.items()}, padding


class Corpus:
  """Holds three components of rows of one length, as our files and as plain arrays for grain."""

  def __init__(
    self, examples: Sequence[packing.Example], seq_len: int, pad_id: int, folder: pathlib.Path
  ):
    self.seq_len = seq_len
    self.sources: list[rows.RowSource] = []
    self.paths: dict[str, list[str]] = {"plain arrays": [], "same files": []}
    packed = list(packing.pack(examples, seq_len=seq_len, pad_id=pad_id))
    for i in range(len(WEIGHTS)):
      part = packed[i :: len(WEIGHTS)]
      path, plain = folder / f"{seq_len}-{i}", folder / f"{seq_len}-{i}-plain"
      counts = rows.write_rows(path, part)
      self.sources.append(rows.RowSource([path], counts=[counts], seq_len=seq_len))
      writer = array_record_module.ArrayRecordWriter(str(plain), PEER_OPTIONS)
      for row in part:
        writer.write(b"".join(array.tobytes() for array in row.values()))
      writer.close()
      self.paths["same files"].append(str(path))
      self.paths["plain arrays"].append(str(plain))
    self.num_tokens = len(packed) * seq_len

  def bytes_per_token(self, kind: str) -> float:
    return sum(os.path.getsize(path) for path in self.paths[kind]) / self.num_tokens

  def ours(self, batch_rows: int) -> Iterator[packing.Batch]:
    num_steps = 10**6
    data = mixture.Mixture(
      [
        mixture.Component(str(i), source, weight, repeat=True)
        for i, (source, weight) in enumerate(zip(self.sources, WEIGHTS))
      ],
      batch_size=batch_rows,
      num_steps=num_steps,
      seed=0,
    )
    return (batch for _, batch in data.iterate(0, num_steps=num_steps))

  def grains(self, batch_rows: int, kind: str) -> Iterator[dict[str, np.ndarray]]:
    decode = {"plain arrays": self._decode_plain, "same files": self._decode_ours}[kind]
    parts = [
      grain.MapDataset.source(grain.sources.ArrayRecordDataSource(path)).shuffle(seed=i).repeat()
      for i, path in enumerate(self.paths[kind])
    ]
    mixed = grain.MapDataset.mix(parts, weights=WEIGHTS).map(decode).batch(batch_rows)
    # Two batches ahead, as ours; grain's default of 500 would hold gigabytes.
    return iter(mixed.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)))

  def _decode_plain(self, record: bytes) -> dict[str, np.ndarray]:
    integers = np.frombuffer(record, np.int32, 3 * self.seq_len).reshape(3, -1)
    return {
      "tokens": integers[0],
      "positions": integers[1],
      "segment_ids": integers[2],
      "loss_mask": np.frombuffer(record, np.bool_, self.seq_len, 12 * self.seq_len),
    }

  def _decode_ours(self, record: bytes) -> dict[str, np.ndarray]:
    return {name: array[0] for name, array in rows.decode([record], self.seq_len).items()}


def loading_cases(corpus: Corpus, batch_rows: int, seconds: float, clock: Clock) -> dict[str, Case]:
  """Returns cases that measure tokens/s of loading."""

  def case(batches: Callable[[], Iterator[dict[str, np.ndarray]]]) -> Case:
    return lambda: rate((batch["tokens"].size for batch in batches()), seconds, clock)

  return {
    "ours": case(lambda: corpus.ours(batch_rows)),
    **{
      f"grain, {kind}": case(lambda kind=kind: corpus.grains(batch_rows, kind))
      for kind in corpus.paths
    },
  }


def waiting_cases(corpus: Corpus, batch_rows: int, seconds: float) -> dict[str, Case]:
  """Returns cases that measure the share of time that the step waits after its first batch."""
  step_seconds = batch_rows * corpus.seq_len / STEP_TOKENS_PER_SECOND

  def share(batches: Iterator) -> float:
    next(batches)
    began, waited = time.perf_counter(), 0.0
    while time.perf_counter() - began < seconds:
      time.sleep(step_seconds)
      asked = time.perf_counter()
      next(batches)
      waited += time.perf_counter() - asked
    return waited / (time.perf_counter() - began)

  return {
    "ours": lambda: share(corpus.ours(batch_rows)),
    "grain": lambda: share(corpus.grains(batch_rows, "plain arrays")),
  }


def floor_cases(corpus: Corpus, clock: Clock) -> dict[str, Case]:
  """Returns cases that measure each part of loading on one core, in tokens/s."""
  places = [(source, i) for source in corpus.sources for i in range(len(source))]
  records = [source.record(i) for source, i in places]
  blocks = [records[i : i + 32] for i in range(0, len(records), 32)]
  compress = zstandard.ZstdCompressor(level=3).compress
  decompress = zstandard.ZstdDecompressor().decompress
  compressed = [compress(record) for record in records]
  batch = np.ones(32 * corpus.seq_len * OUTPUT_BYTES, np.uint8)
  shuffled = np.random.default_rng(0).permutation(len(places)).tolist()

  parts = {
    "memory: copying a batch": lambda: [batch.copy() for _ in blocks],
    "zstd: decompressing the records": lambda: [decompress(data) for data in compressed],
    READING: lambda: [places[i][0].record(places[i][1]) for i in shuffled],
    DECODING: lambda: [rows.decode(block, corpus.seq_len) for block in blocks],
  }
  return {name: timed(corpus.num_tokens, run, clock) for name, run in parts.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
  return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
  return spread([x / y for x, y in zip(a, b, strict=True)])


def show(title: str, found: dict[str, list[float]], *, share: bool = False) -> None:
  print(title)
  scale, unit = (100, "%") if share else (1e-6, " M tokens/s")
  for name, values in found.items():
    median, low, high = (value * scale for value in spread(values).values())
    text = f"  {name:34}{median:8.2f} [{low:.2f} .. {high:.2f}]{unit}"
    if name.startswith("grain") and not share:
      r = ratios(found["ours"], values)
      text += f"; ours is {r['median']:.2f}x [{r['min']:.2f} .. {r['max']:.2f}]"
    print(text, flush=True)


def make_examples(arguments: argparse.Namespace) -> tuple[list[packing.Example], int]:
  """Returns tokenized documents and the id of padding; prints how fast they were made."""
  began = time.perf_counter()
  texts = read_texts(arguments.packages, arguments.chars)
  num_chars, read = sum(map(len, texts)), time.perf_counter() - began
  bpe = tokenizer.train_bpe(texts[:4000], vocab_size=arguments.vocab_size)
  began = time.perf_counter()
  ids = bpe.encode_batch(texts)
  tokenized = time.perf_counter() - began
  began = time.perf_counter()
  examples = [packing.document_example(document, bpe) for document in ids]
  made = time.perf_counter() - began
  num_tokens = sum(len(example.tokens) for example in examples)
  print(
    f"{len(texts)} documents, {num_chars:,} characters, {num_tokens:,} tokens. For information: "
    f"parsing {num_chars / read / 1e6:.2f} M characters/s, tokenizing "
    f"{num_tokens / tokenized / 1e6:.2f} M tokens/s, examples of ids "
    f"{num_tokens / made / 1e6:.1f} M tokens/s"
  )
  return examples, bpe.pad_id


def bench(
  examples: list[packing.Example],
  pad_id: int,
  seq_len: int,
  arguments: argparse.Namespace,
  folder: pathlib.Path,
) -> list[dict[str, Any]]:
  """Runs all cases for one length of rows."""
  cases, repeats, batch_rows = [], arguments.repeats, arguments.batch_rows
  clock = CLOCKS[arguments.clock]

  def add(case: str, found: dict[str, list[float]], **more: Any) -> None:
    cases.append({"case": case, "seq_len": seq_len, **more})
    cases[-1] |= {name: spread(values) for name, values in found.items()}

  cut = pieces(examples, seq_len)
  packers, padding = packing_cases(cut, seq_len, pad_id, folder, clock)
  found = in_turns(packers, repeats)
  shares = ", ".join(f"{name} {share:.2%}" for name, share in padding.items())
  show(f"rows of {seq_len}, packing (padding: {shares})", found)
  add("pack", found, padding=padding, ratio=ratios(found["ours"], found["grain"]))

  corpus = Corpus(cut, seq_len, pad_id, folder)
  size = {kind: corpus.bytes_per_token(kind) for kind in corpus.paths}
  sizes = ", ".join(f"{kind} {value:.2f}" for kind, value in size.items())
  found = in_turns(floor_cases(corpus, clock), repeats)
  show(f"rows of {seq_len}, parts of loading (bytes per token on disk: {sizes})", found)
  together = 1 / sum(1 / statistics.median(found[part]) for part in (READING, DECODING))
  print(f"  {'reading, then decoding':34}{together / 1e6:8.2f}")
  add("floor", found, bytes_per_token=size, reading_then_decoding=together)

  found = in_turns(loading_cases(corpus, batch_rows, arguments.seconds, clock), repeats)
  show(f"rows of {seq_len}, loading batches of {batch_rows}", found)
  add("load", found, ratio=ratios(found["ours"], found["grain, plain arrays"]))

  found = in_turns(waiting_cases(corpus, batch_rows, arguments.seconds), repeats)
  pace = f"{STEP_TOKENS_PER_SECOND / 1e6} M tokens/s"
  show(f"rows of {seq_len}, share of time that a step of {pace} waits for data", found, share=True)
  add("wait", found)
  return cases


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--seq_lens", type=int, nargs="+", default=[256, 1024, 4096])
  parser.add_argument("--batch_rows", type=int, default=32, help="rows per batch")
  parser.add_argument("--repeats", type=int, default=5, help="runs of each case")
  parser.add_argument(
    "--seconds", type=float, default=1.0, help="length of a loading or waiting run"
  )
  parser.add_argument("--chars", type=int, default=20_000_000, help="characters of text")
  parser.add_argument(
    "--clock", choices=CLOCKS, default="wall", help="cpu: tokens per second of CPU time"
  )
  parser.add_argument("--vocab_size", type=int, default=8192, help="size of the trained tokenizer")
  parser.add_argument(
    "--packages",
    nargs="*",
    default=[],
    help="import names whose docstrings are used; default: all installed packages",
  )
  bench_common.add_flag(parser)
  arguments = parser.parse_args()
  machine = bench_common.begin(arguments.wait_seconds)
  examples, pad_id = make_examples(arguments)
  cases = []
  with bench_common.Others() as others:
    for seq_len in sorted(arguments.seq_lens):
      bench_common.note(f"rows of {seq_len}")
      with tempfile.TemporaryDirectory() as folder:
        cases += bench(examples, pad_id, seq_len, arguments, pathlib.Path(folder))
  others.warn()
  slowest = {
    name: min(case["ours"]["median"] for case in cases if case["case"] == name) for name in TARGETS
  }
  for name, target in TARGETS.items():
    met = "met" if slowest[name] >= target else "MISSED"
    print(f"{name}: {slowest[name] / 1e6:.2f} M tokens/s at least; target {target / 1e6}: {met}")
  ratio = [case["ratio"] for case in cases if case["case"] == "load"][-1]
  result = {
    "ratio": ratio["median"],
    "ratio_spread": [ratio["min"], ratio["max"]],
    "measured": f"tokens/s of loading shuffled, mixed rows of {max(arguments.seq_lens)}, ours over "
    f"grain's on plain arrays: median and range of {arguments.repeats} alternating pairs",
    "unit": f"tokens/s ({arguments.clock} time); for waiting, share of time",
    "slowest": slowest,
    "machine": machine | {"others_cpus": others.cpus},
    "cases": cases,
  }
  print(json.dumps(result))


if __name__ == "__main__":
  main()
