import subprocess
import sys

import pytest

from selfimprove_jax.data import shingles


def test_case_and_punctuation_do_not_matter():
  assert shingles.word_shingles("The cat, sat!", 3) == shingles.word_shingles("the CAT sat", 3)


def test_a_text_has_one_shingle_for_each_run_of_words():
  assert len(shingles.word_shingles("a b c d e", 3)) == 3
  assert len(shingles.word_shingles("a a a a a", 3)) == 1


def test_a_text_shorter_than_a_shingle_has_none():
  assert shingles.word_shingles("a b", 3) == frozenset()


def test_the_bounds_of_words_count():
  assert not shingles.word_shingles("ab c", 2) & shingles.word_shingles("a bc", 2)


def test_hashes_are_the_same_in_every_process():
  program = "from selfimprove_jax.data.shingles import *; print(*word_shingles('a b c', 3))"
  output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert {int(output.stdout)} == shingles.word_shingles("a b c", 3)


def test_jaccard_is_the_shared_part():
  a, b = frozenset({1, 2, 3}), frozenset({2, 3, 4, 5})
  assert shingles.jaccard(a, b) == pytest.approx(2 / 5)
  assert shingles.jaccard(a, a) == 1
  assert shingles.jaccard(frozenset(), frozenset()) == 0
