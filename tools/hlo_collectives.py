"""Collectives of a compiled program, from XLA's text of it: how often, and how many bytes."""

import collections
import re

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_BITS = {"pred": 8, "bf16": 16}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\(([^)]*)\)(.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|(?:true|false)_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def count(hlo: str) -> dict[str, dict[str, int]]:
  """Kind -> {"count", "bytes"} of one device in one run of the program.

  Bytes are those of the whole array that a collective is about: what an all-gather gives, what a
  reduce-scatter or all-reduce takes. What stands in a loop counts as often as the loop runs where
  XLA says how often, or its condition compares a counter with a constant, as that of `lax.scan`
  does; else once.
  """
  computations, entry = _parse(hlo)
  totals: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})

  def add(name, times):
    for kind, num_bytes in computations[name].collectives:
      totals[kind]["count"] += times
      totals[kind]["bytes"] += times * num_bytes
    for called in computations[name].calls:
      if called in computations:
        add(called, times)
    for trips, condition, body in computations[name].loops:
      add(body, times * (trips or computations[condition].trips))

  add(entry, 1)
  return dict(totals)


class _Computation:
  """What of a computation matters: its collectives, whom it calls, and its trips as a condition."""

  def __init__(self):
    self.collectives: list[tuple[str, int]] = []
    self.calls: list[str] = []
    self.loops: list[tuple[int | None, str, str]] = []
    self.trips = 1


def _parse(hlo):
  computations: dict[str, _Computation] = {}
  entry, current, sizes, constants = "", _Computation(), {}, {}
  for line in hlo.splitlines():
    if header := _HEADER.match(line):
      current = computations[header[2]] = _Computation()
      name, sizes, constants = header[2], {}, {}
      entry = name if header[1] else entry
    elif operation := _OPERATION.match(line):
      root, result, shape, opcode, operands, rest = operation.groups()
      operands = re.findall(r"%([\w.\-]+)", operands)
      sizes[result] = _bytes(shape)
      if opcode == "constant" and (value := re.search(r"constant\((\d+)\)", line)):
        constants[result] = int(value[1])
      if root and opcode == "compare" and "direction=LT" in rest and operands[-1] in constants:
        current.trips = constants[operands[-1]]
      if (kind := opcode.removesuffix("-start")) in KINDS:
        taken = sum(sizes.get(operand, 0) for operand in operands)
        given = sizes[result] - (taken if opcode.endswith("-start") else 0)
        # XLA for TPUs writes a reduce-scatter as a fusion of an all-reduce with a slice.
        kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
        current.collectives.append((kind, max(taken, given)))
      if opcode == "while":
        condition, body = _LOOP.search(rest).groups()
        trips = int(known[1]) if (known := _TRIPS.search(rest)) else None
        current.loops.append((trips, condition, body))
      elif kind not in KINDS:
        current.calls += _CALLED.findall(rest)
        for branches in _BRANCHES.findall(rest):
          current.calls += re.findall(r"%?([\w.\-]+)", branches)
  return computations, entry


def _bytes(shape):
  total = 0
  for dtype, dims in _SHAPE.findall(shape):
    size = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
    for dim in filter(None, dims.split(",")):
      size *= int(dim)
    total += size // 8
  return total
