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


def test_each_character_is_a_word_where_a_script_has_no_spaces():
  assert shingles.words("今日は。晴れ、GPT4です") == [*"今日は晴れ", "gpt4", *"です"]
  assert shingles.words("หมา ມາ ខ្ញុំ") == [*"หมา", *"ມາ", *"ខ្ញុំ"]


def test_two_characters_count_as_one_word_where_a_script_has_no_spaces():
  tokens = shingles.words("one 二三四 five 六")
  assert shingles.num_words(tokens) == 4
  assert shingles.runs(tokens, 3) == ["one 二 三 四 five", "二 三 四 five 六"]
  assert shingles.runs(tokens, 5) == []
  assert shingles.tail(tokens, 2) == ["四", "five", "六"]
  assert shingles.tail(tokens, 9) == tokens


def test_marks_and_composition_do_not_split_words():
  assert shingles.words("हिन्दी 한국어 cafe\u0301") == ["हिन्दी", "한국어", "caf\u00e9"]
  assert shingles.words("x² snake_case it's 3.5") == ["x²", "snake_case", "it", "s", "3", "5"]


def test_hashes_are_the_same_in_every_process():
  program = "from selfimprove_jax.data.shingles import *; print(*word_shingles('a b c', 3))"
  output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert {int(output.stdout)} == shingles.word_shingles("a b c", 3)


def test_jaccard_is_the_shared_part():
  a, b = frozenset({1, 2, 3}), frozenset({2, 3, 4, 5})
  assert shingles.jaccard(a, b) == pytest.approx(2 / 5)
  assert shingles.jaccard(a, a) == 1
  assert shingles.jaccard(frozenset(), frozenset()) == 0
