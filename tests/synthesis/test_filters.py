import gzip
import json

import numpy as np
import pytest

from selfimprove_jax.synthesis import filters

SEED = "the heart pumps blood through the body and the lungs give it oxygen"
GOOD = "arteries carry blood away from the heart while veins bring it back again"


def record(name: str, text: str, **more) -> dict:
  made = {"id": name, "text": text, "num_tokens": 20, "finish_reason": "eos", "seed_text": None}
  return made | more


def run(records, **changes):
  options = dict(min_tokens=10, max_repetition=0.3, max_jaccard=0.5, shingle_size=3)
  return filters.filter_documents(records, **{**options, **changes})


def test_each_reason_drops_its_documents_and_the_rest_is_kept_as_it_was():
  records = [
    record("good", GOOD, seed_text=SEED, seed_id="s1"),
    record("short", "a short but decent text", num_tokens=9),
    record("loop", "it goes on and on " + "and on " * 30),
    record("copy of seed", SEED + " always", seed_text=SEED),
    record("copy of good", GOOD + " always", seed_text=SEED),
    record("copy of corpus", "a rolling stone gathers no moss they say in the village"),
    record("other", "volcanoes erupt when magma rises through cracks in the crust of the earth"),
  ]
  corpus = ["unrelated text of many words", "a rolling stone gathers no moss they say in the city"]
  kept, dropped, counts = run(records, references=iter(corpus))
  assert kept == [records[0], records[6]]
  assert [(r["id"], r["reason"]) for r in dropped] == [
    ("short", "too_short"),
    ("loop", "looping"),
    ("copy of seed", "near_duplicate"),
    ("copy of good", "near_duplicate"),
    ("copy of corpus", "near_duplicate"),
  ]
  assert counts == {"sampled": 7, "too_short": 1, "looping": 1, "near_duplicate": 3, "kept": 2}
  assert all("reason" not in r for r in records)


def test_a_document_is_dropped_for_an_earlier_one_only():
  kept, dropped, _ = run([record("first", GOOD), record("second", GOOD)])
  assert [r["id"] for r in kept] == ["first"]
  assert [r["id"] for r in dropped] == ["second"]


def test_a_document_is_not_dropped_for_one_that_was_too_short():
  kept, _, _ = run([record("first", GOOD, num_tokens=3), record("second", GOOD)])
  assert [r["id"] for r in kept] == ["second"]


def test_a_document_of_dashes_is_too_short():
  _, dropped, _ = run([record("dashes", "- " * 500, num_tokens=500)])
  assert dropped[0]["reason"] == "too_short"


def test_nothing_in_nothing_out():
  assert run([]) == (
    [],
    [],
    {"sampled": 0, "too_short": 0, "looping": 0, "near_duplicate": 0, "kept": 0},
  )


def test_repetition_is_the_share_of_ngrams_seen_before():
  assert filters.repetition("a b c d e f") == 0
  assert filters.repetition("a b c a b c") == 0.25  # abc bca cab abc
  assert filters.repetition("x x x x x x") == 0.75
  assert filters.repetition("X, x. x! x", n=1) == 0.75
  assert filters.repetition("a b") == 0


def test_a_loop_at_the_end_of_a_long_document_is_seen():
  text = " ".join(f"word{i}" for i in range(400)) + " and so on" * 20
  assert filters.repetition(text) < 0.2
  assert filters.is_looping(text, max_repetition=0.3)
  assert not filters.is_looping(text[: -10 * 20], max_repetition=0.3)


def test_a_share_that_is_no_share_is_refused():
  with pytest.raises(ValueError, match=r"max_repetition=30\.0"):
    run([], max_repetition=30.0)


def test_textbook_passages_seldom_look_like_loops(real_data):
  with gzip.open(real_data / "corpora/openstax.jsonl.gz", "rt", encoding="utf-8") as file:
    sections = [json.loads(line)["text"] for line in file][::4]
  passages = [" ".join(section.split()[:250]) for section in sections]
  flags = [filters.is_looping(passage, max_repetition=0.3) for passage in passages]
  assert np.mean(flags) < 0.02
