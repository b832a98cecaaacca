import itertools
import json
import subprocess
import sys

import pytest

from selfimprove_jax.synthesis import units
from selfimprove_jax.synthesis.units import BudgetConfig, Unit


def test_an_id_is_that_of_the_fields_in_any_process():
  unit = Unit("d", "pair", ("a", "b"), 1)
  others = [
    Unit("e", "pair", ("a", "b"), 1),
    Unit("d", "pair", ("b", "a"), 1),
    Unit("d", "pair", ("a", "b"), 2),
    Unit("d", "triplet", ("a", "b", "c"), 1),
  ]
  assert len({one.id for one in [unit, *others]}) == 5
  code = "from selfimprove_jax.synthesis.units import Unit; print(Unit('d','pair',('a','b'),1).id)"
  other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert other.stdout.strip() == unit.id == "f42c0fc5fd0f12ec"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("d", "pairs"), "kind is 'pairs'"),
    (("d", "pair", ("a",)), "kind 'pair' has 2"),
    (("d", "entities", ("a",)), "kind 'entities' has 0"),
    (("d", "entities", (), -1), "sample is -1"),
  ],
)
def test_a_wrong_unit_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    Unit(*arguments)


def test_relations_are_all_pairs_in_order_and_then_all_triplets_once():
  entities = list("abcdefg")
  found = list(units.relation_units("d", entities, seed=3))
  pairs, triplets = found[:21], found[21:]
  assert [unit.key for unit in pairs] == list(itertools.combinations(entities, 2))
  assert {unit.kind for unit in pairs} == {"pair"} and {u.kind for u in triplets} == {"triplet"}
  keys = [unit.key for unit in triplets]
  assert sorted(keys) == list(itertools.combinations(entities, 3)) != keys
  assert units.num_relation_units(7) == {"pair": 21, "triplet": 35}


def test_the_order_of_triplets_depends_on_seed_and_document_alone():
  def order(document, seed):
    return [unit.key for unit in units.relation_units(document, list("abcdef"), seed)][15:]

  assert order("d", 1) == order("d", 1)
  assert order("d", 1) != order("d", 2) and order("d", 1) != order("e", 1)


def test_triplets_of_a_hundred_entities_begin_at_once_and_end():
  entities = [f"e{i}" for i in range(100)]
  relations = units.relation_units("d", entities, seed=0)
  assert len(list(itertools.islice(relations, 4950 + 10))) == 4960
  assert units.num_relation_units(100) == {"pair": 4950, "triplet": 161_700}
  assert {units._triplet(n) for n in (0, 161_699)} == {(0, 1, 2), (97, 98, 99)}


@pytest.mark.parametrize(
  ("entities", "number"), [([], 0), (["a"], 0), (["a", "b"], 1), (["a", "b", "c"], 4)]
)
def test_few_entities_have_few_relations(entities, number):
  assert len(list(units.relation_units("d", entities, 0))) == number


def test_an_entity_that_occurs_twice_is_refused():
  with pytest.raises(ValueError, match="each must occur once"):
    list(units.relation_units("d", ["a", "b", "a"], 0))


def test_other_units_are_counted():
  styles = ("easy", "qa")
  rephrased = list(units.rephrase_units("d", styles, 3))
  assert [(u.kind, u.sample) for u in rephrased[:3]] == [
    ("rephrase/easy", 0),
    ("rephrase/qa", 0),
    ("rephrase/easy", 1),
  ]
  every = [
    units.entities_unit("d"),
    units.strategy_unit("d"),
    *rephrased,
    *units.spa_units("d", 2),
    *units.apply_units("d", ["s", "t"], 2),
    *units.focal_units("d", ["q1", "q2", "q3"], 2),
  ]
  assert len({unit.id for unit in every}) == len(every) == 2 + 6 + 14 + 4 + 6


@pytest.mark.parametrize(("limit", "number"), [(None, 35), (0, 0), (3, 3), (34, 34), (99, 35)])
def test_texts_of_a_document_are_limited_and_lists_are_not_counted(limit, number):
  relations = units.relation_units("d", list("abcdef"), 0)
  stream = itertools.chain([units.entities_unit("d")], relations)
  kept = list(units.within(stream, BudgetConfig(max_texts_per_document=limit)))
  assert len(kept) == number + 1
  assert len(list(relations)) == (max(0, 35 - number - 1))  # one is read to see that it is over


def test_units_of_two_documents_are_not_limited_together():
  both = [units.entities_unit("d"), units.entities_unit("e")]
  with pytest.raises(ValueError, match="documents 'd' and 'e'"):
    list(units.within(both, BudgetConfig()))


def test_documents_take_turns():
  streams = (units.rephrase_units(name, ("easy",), n) for name, n in (("a", 1), ("b", 3), ("c", 2)))
  assert "".join(unit.document for unit in units.interleaved(streams)) == "abcbcb"


def test_a_budget_is_spent_by_tokens_or_dollars():
  budget = BudgetConfig(max_tokens=10, max_usd=2.0)
  assert not budget.is_spent(tokens=9, usd=1.9)
  assert budget.is_spent(tokens=10, usd=0.0) and budget.is_spent(tokens=0, usd=2.0)
  assert not BudgetConfig().is_spent(tokens=10**12, usd=1e9)


def test_a_record_gives_its_unit():
  unit = Unit("d", "triplet", ("a", "b", "c"), 4)
  record = {"document": "d", "kind": "triplet", "key": ["a", "b", "c"], "sample": 4, "text": ""}
  assert units.unit_of(json.loads(json.dumps(record))) == unit
