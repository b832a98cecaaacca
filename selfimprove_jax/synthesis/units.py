"""Units of synthesis: each names one text that a language model writes about a document.

Units are made by pure generators, so a run that starts again makes the same ones in the same order.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from selfimprove_jax.runs import artifacts
from selfimprove_jax.runtime.config import section

ENTITIES, PAIR, TRIPLET = "entities", "pair", "triplet"
REPHRASE_STYLES = ("easy", "medium", "hard", "qa")
SPA_TASKS = (
  "key_concepts",
  "mind_map",
  "implications",
  "critical_questions",
  "case_studies",
  "discussions",
  "teacher",
)
STRATEGIES, APPLY, FOCAL = "active_reading/strategies", "active_reading/apply", "focal"
KINDS = (
  *(ENTITIES, PAIR, TRIPLET),
  *(f"rephrase/{style}" for style in REPHRASE_STYLES),
  *(f"spa/{task}" for task in SPA_TASKS),
  *(STRATEGIES, APPLY, FOCAL),
)
LIST_KINDS = (ENTITIES, STRATEGIES)
"""Kinds whose reply is JSON, from which other units are made."""

_KEY_LENGTHS = {PAIR: 2, TRIPLET: 3, APPLY: 1, FOCAL: 1}


@dataclasses.dataclass(frozen=True)
class Unit:
  """One call of synthesis.

  Attributes:
    document: id of the source document.
    kind: one of `KINDS`.
    key: names of the entities in the order of their list (pair, triplet), the text of the strategy
      (active_reading/apply), or the id of the question (focal); empty for other kinds.
    sample: distinguishes several texts of one kind and key.
  """

  document: str
  kind: str
  key: tuple[str, ...] = ()
  sample: int = 0

  def __post_init__(self) -> None:
    if self.kind not in KINDS:
      raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
    if len(self.key) != (length := _KEY_LENGTHS.get(self.kind, 0)):
      raise ValueError(f"key is {self.key!r}; a unit of kind {self.kind!r} has {length} of them")
    if self.sample < 0:
      raise ValueError(f"sample is {self.sample}; it must be at least 0")

  @functools.cached_property
  def id(self) -> str:
    """The first 16 hexadecimal digits of a SHA-256 over the fields."""
    return artifacts.digest([self.document, self.kind, list(self.key), self.sample])[:16]


@section
class BudgetConfig:
  """Limits how much is synthesized; the limit that is reached first ends the synthesis.

  Attributes:
    max_texts_per_document: maximum number of units of each document; `LIST_KINDS` do not count.
    max_tokens: synthesis ends with the first text by which this many tokens have been sampled.
    max_usd: synthesis ends with the first text by which calls for this price have been made.
  """

  max_texts_per_document: Annotated[int, Field(ge=0)] | None = None
  max_tokens: Annotated[int, Field(ge=1)] | None = None
  max_usd: Annotated[float, Field(gt=0)] | None = None

  def is_spent(self, *, tokens: int, usd: float) -> bool:
    """Tells whether this many tokens or dollars use up the budget."""
    return (self.max_tokens is not None and tokens >= self.max_tokens) or (
      self.max_usd is not None and usd >= self.max_usd
    )


def entities_unit(document: str) -> Unit:
  """Returns the unit that lists the entities of a document (EntiGraph, step 1)."""
  return Unit(document, ENTITIES)


def relation_units(document: str, entities: Sequence[str], seed: int) -> Iterator[Unit]:
  """Yields all pairs of entities in the order of the list, then all triplets in a seeded order.

  A permutation of the triplets' numbers is all that is held: 100 entities have 161,700 triplets.

  Args:
    seed: of the order of the triplets, in [0, 2**32); documents have different orders.

  Raises:
    ValueError: an entity occurs twice.
  """
  if len(set(entities)) != len(entities):
    raise ValueError(f"entities are {list(entities)}; each must occur once")
  for pair in itertools.combinations(entities, 2):
    yield Unit(document, PAIR, pair)
  num_triplets = num_relation_units(len(entities))[TRIPLET]
  of_document = int(artifacts.digest(document)[:8], 16)
  order = np.random.default_rng([seed, of_document]).permutation(num_triplets)
  for number in order:
    yield Unit(document, TRIPLET, tuple(entities[i] for i in _triplet(int(number))))


def num_relation_units(num_entities: int) -> dict[str, int]:
  """Returns the number of pairs and of triplets, by kind."""
  return {PAIR: math.comb(num_entities, 2), TRIPLET: math.comb(num_entities, 3)}


def rephrase_units(document: str, styles: Sequence[str], num_samples: int) -> Iterator[Unit]:
  """Yields the units that rephrase a document: a sample of each style, then the next sample."""
  for sample, style in itertools.product(range(num_samples), styles):
    yield Unit(document, f"rephrase/{style}", sample=sample)


def spa_units(document: str, num_samples: int, tasks: Sequence[str] = SPA_TASKS) -> Iterator[Unit]:
  """Yields the units of SPA's seven tasks (arXiv 2603.22213): a sample of each, then the next."""
  for sample, task in itertools.product(range(num_samples), tasks):
    yield Unit(document, f"spa/{task}", sample=sample)


def strategy_unit(document: str, sample: int = 0) -> Unit:
  """Returns the unit that lists strategies to study a document (Active Reading, 2508.09494)."""
  return Unit(document, STRATEGIES, sample=sample)


def apply_units(document: str, strategies: Sequence[str], num_samples: int) -> Iterator[Unit]:
  """Yields the units that apply each strategy to a document, a sample of each at a time."""
  for sample, strategy in itertools.product(range(num_samples), strategies):
    yield Unit(document, APPLY, (strategy,), sample)


def focal_units(document: str, question_ids: Sequence[str], num_samples: int) -> Iterator[Unit]:
  """Yields the units that rewrite a document with one question in view (arXiv 2603.23562)."""
  for sample, id_ in itertools.product(range(num_samples), question_ids):
    yield Unit(document, FOCAL, (id_,), sample)


def within(units: Iterable[Unit], budget: BudgetConfig) -> Iterator[Unit]:
  """Yields the units of one document up to its `max_texts_per_document`-th text.

  Reads no unit after the first one that it leaves out. Units of `LIST_KINDS` do not count.

  Raises:
    ValueError: while iterating: there are units of two documents.
  """
  limit = math.inf if budget.max_texts_per_document is None else budget.max_texts_per_document
  num_texts, document = 0, None
  for unit in units:
    if unit.document != (document := document or unit.document):
      raise ValueError(
        f"units are of documents {document!r} and {unit.document!r}; limit each document by itself"
      )
    num_texts += unit.kind not in LIST_KINDS
    if num_texts > limit:
      return
    yield unit


def interleaved(units_of_documents: Iterable[Iterable[Unit]]) -> Iterator[Unit]:
  """Yields a unit of each document in turn, so that a budget is spent on all of them alike."""
  waiting = [iter(units) for units in units_of_documents]
  while waiting:
    left = []
    for units in waiting:
      if (unit := next(units, None)) is not None:
        left.append(units)
        yield unit
    waiting = left


def unit_of(record: Mapping[str, Any]) -> Unit:
  """Returns the unit of a record that `calls.answer` wrote."""
  return Unit(record["document"], record["kind"], tuple(record["key"]), record["sample"])


def _triplet(number: int) -> tuple[int, int, int]:
  """Returns i < j < k of a triplet's number in the combinatorial number system."""
  found = []
  for size in (3, 2, 1):
    # The largest n with comb(n, size) <= number.
    n = size - 1
    while math.comb(n + 1, size) <= number:
      n += 1
    found.append(n)
    number -= math.comb(n, size)
  k, j, i = found
  return i, j, k
