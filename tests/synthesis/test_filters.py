"""Which sampled documents are dropped, and why."""

import gzip
import json

import numpy as np
import pytest

from selfimprove_jax.runtime import config
from selfimprove_jax.synthesis import filters

SEED = "the heart pumps blood through the body and the lungs give it oxygen"
GOOD = "arteries carry blood away from the heart while veins bring it back again"


def record(name: str, text: str, **more) -> dict:
  made = {"id": name, "text": text, "num_tokens": 20, "finish_reason": "eos", "seed_text": None}
  return made | more


def run(records, references=()):
  section = filters.DocumentFilterConfig(min_tokens=10, max_repetition=0.3, max_jaccard=0.5)
  return filters.filter_documents(records, section, shingle_size=3, references=references)


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


@pytest.mark.parametrize(
  ("text", "share"),
  [
    ("a b c d e f", 0.0),
    ("a b c a b c", 0.25),  # abc bca cab abc
    ("x x x x x x", 0.75),
    ("X, x. x! x, x; x", 0.75),
    ("a b", 0.0),
  ],
)
def test_a_document_loops_if_more_than_a_share_of_its_3_grams_were_seen_before(text, share):
  assert not filters.is_looping(text, max_repetition=share)
  assert filters.is_looping(text, max_repetition=share - 0.01)


def test_a_loop_at_the_end_of_a_long_document_is_seen():
  text = " ".join(f"word{i}" for i in range(400)) + " and so on" * 20
  assert len(set(text.split())) > 0.8 * len(text.split())
  assert filters.is_looping(text, max_repetition=0.3)
  assert not filters.is_looping(text[: -10 * 20], max_repetition=0.3)


def test_text_without_spaces_is_judged_like_any_other():
  texts = {
    "good": "心臟把血液送到全身，肺部給血液帶來氧氣，靜脈再把血液送回來。",
    "loop": "火山爆發時岩漿會從地殼的裂縫中噴出來，" * 4,
    "copy": "心臟把血液送到全身，肺部給血液帶來氧氣，靜脈又把血液送回來。",
  }
  kept, dropped, _ = run([record(name, text) for name, text in texts.items()])
  assert [r["id"] for r in kept] == ["good"]
  reasons = {r["id"]: r["reason"] for r in dropped}
  assert reasons == {"loop": "looping", "copy": "near_duplicate"}


def test_a_share_that_is_no_share_is_refused():
  values = dict(min_tokens=10, max_repetition=30.0, max_jaccard=0.5)
  with pytest.raises(ValueError, match=r"max_repetition=30\.0"):
    config.parse(filters.DocumentFilterConfig, values)


def test_textbook_passages_seldom_look_like_loops(real_data):
  with gzip.open(real_data / "corpora/openstax.jsonl.gz", "rt", encoding="utf-8") as file:
    sections = [json.loads(line)["text"] for line in file][::4]
  passages = [" ".join(section.split()[:250]) for section in sections]
  flags = [filters.is_looping(passage, max_repetition=0.3) for passage in passages]
  assert np.mean(flags) < 0.02
