"""Counts the collectives of a compiled program, and their bytes, from its HLO text."""

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
  """Returns kind -> {"count", "bytes"} of one device in one run of the program.

  Bytes are those of the whole array: the result of an all-gather, the operand of a reduce-scatter
  or all-reduce. A collective in a loop counts once per iteration, if XLA states the trip count or
  the loop's condition compares a counter with a constant, as that of `lax.scan` does; else once.
  """
  computations, entry = _parse(hlo)
  totals: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})

  def add(name: str, times: int) -> None:
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
  """A computation's collectives and calls; as the condition of a loop, also its trip count."""

  def __init__(self) -> None:
    self.collectives: list[tuple[str, int]] = []
    self.calls: list[str] = []
    self.loops: list[tuple[int | None, str, str]] = []
    self.trips = 1


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
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
        operand_bytes = sum(sizes.get(operand, 0) for operand in operands)
        # An async start returns its operands next to its results.
        result_bytes = sizes[result] - (operand_bytes if opcode.endswith("-start") else 0)
        # XLA for TPUs expresses a reduce-scatter as a fusion of an all-reduce with a slice.
        kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
        current.collectives.append((kind, max(operand_bytes, result_bytes)))
      if opcode == "while":
        condition, body = _LOOP.search(rest).groups()
        trips = int(known[1]) if (known := _TRIPS.search(rest)) else None
        current.loops.append((trips, condition, body))
      elif kind not in KINDS:
        current.calls += _CALLED.findall(rest)
        for branches in _BRANCHES.findall(rest):
          current.calls += re.findall(r"%?([\w.\-]+)", branches)
  return computations, entry


def _bytes(shape: str) -> int:
  total = 0
  for dtype, dims in _SHAPE.findall(shape):
    size = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
    for dim in filter(None, dims.split(",")):
      size *= int(dim)
    total += size // 8
  return total
