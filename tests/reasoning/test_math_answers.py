"""Answers found in text, and compared: by our own rules, and by math-verify in processes."""

import importlib.util
import json
import os
import time

import pytest

from selfimprove_jax.reasoning import math_answers
from selfimprove_jax.reasoning.math_answers import extract_answer, grade, normalize

_needs_math_verify = pytest.mark.skipif(
  importlib.util.find_spec("math_verify") is None, reason="the extra math is not installed"
)


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    (r"So 3 \boxed{x} or rather \boxed{\frac{1}{2}}, not 7.", r"\frac{1}{2}"),
    (r"\boxed{1, then \boxed{5}", "5"),
    (r"\boxed{} and so it is 4", "4"),
    ("First 9.\nFinal Answer: 18 dollars.\nBecause 20 - 2 = 18, as 5 knew", "18 dollars"),
    ("\n\nFinal Answer:\n 42", "42"),
    ("The answer is 7.\nNo, the answer is 8.", "8"),
    ("The answer is 7. Final answer: $x^2$ metres", "x^2"),
    (r"**Answer:** \(3\pi\).", r"3\pi"),
    ("2 + 2 = 4\n#### 4", "4"),
    ("he pays $3, then 4,500 in all", "4,500"),
    ("no idea", None),
    ("", None),
  ],
)
def test_the_answer_is_found(text, answer):
  assert extract_answer(text, numbers_only=False) == answer


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    (r"\boxed{18\text{ dollars}}", "18"),
    (r"\boxed{3} and \boxed{x}", "3"),
    ("Final Answer: 3 + 4 = 7 apples\n 9", "7"),
    ("The answer is $1,250.50 per year.", "1,250.50"),
    ("The answer is 7, an answer is good.", "7"),
    ("the answer is unknown", None),
    ("10/4", "10/4"),
    ("it is -3.", "-3"),
  ],
)
def test_only_the_number_is_extracted_for_the_numbers_checker(text, answer):
  assert extract_answer(text, numbers_only=True) == answer


@pytest.mark.parametrize(
  ("one", "other"),
  [
    ("1,000", "1000.0"),
    ("$18", "18"),
    ("0.5", r"\frac12"),
    (r"\dfrac{2}{4}", "1/2"),
    (r"\text{Evelyn}", "evelyn."),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    ("-3", "\u22123"),
    (r"90^\circ", "90"),
    (r"50\%", "50"),
  ],
)
def test_spellings_of_one_answer_are_normalized_alike(one, other):
  assert normalize(one) == normalize(other)


@pytest.mark.parametrize(("one", "other"), [("1", "-1"), ("1.5", "15"), ("x", "y"), ("1/0", "0")])
def test_different_answers_stay_different(one, other):
  assert normalize(one) != normalize(other)


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    (r"\boxed{\frac{3}{4}}", "3/4"),
    (r"\boxed{-\tfrac12}", "-1/2"),
    (r"\boxed{3\dfrac{1}{2}}", "3 1/2"),
    ("The answer is 3 1/2 cups", "3 1/2"),
    ("The answer is 3\u00bd.", "3 1/2"),
    (r"so $\frac{3}{4}$ of it", "3/4"),
    (r"\boxed{12{,}345}", "12345"),
    (r"\boxed{1\,250}", "1250"),
    (r"\boxed{\$1{,}250.50}", "1250.50"),
    (r"\boxed{2.5\times 10^{3}}", "2.5e3"),
    (r"\boxed{5\text{ cm}}", "5"),
    (r"\boxed{5\text{ cm}^2}", "5"),
    (r"\boxed{\text{5 apples}}", "5"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{x=3}", "3"),
    (r"\boxed{= 3}", "3"),
    ("Answer: 10 = 2 * 5", "10"),
    ("The answer is 10 (that is 2 * 5).", "10"),
    ("The answer is $5 and not $6.", "5"),
    ("The answer is **42** dollars.", "42"),
    ("Final answer: In 3 days he earns 54 dollars", "54"),
    ("Final answer: \u22123", "-3"),
    ("the answer is 7!", "7"),
    ("in all 10-4", "4"),
    ("so it is x^2", None),
    # Expressions and lists are no number, and no part of them is the answer.
    (r"\boxed{3+4}", "3+4"),
    (r"\boxed{5x}", "5x"),
    (r"\boxed{2\pi}", r"2\pi"),
    (r"\boxed{3, 4}", "3, 4"),
    (r"\boxed{3 \text{ or } 4}", r"3 \text{ or } 4"),
    (r"\boxed{[2,5)}", "[2,5)"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    # Boxes: the last closed one; a cut one is not read.
    (r"\boxed{3} or \boxed{4}", "4"),
    (r"\boxed{\boxed{8}}", "8"),
    (r"\boxed 5.", "5"),
    (r"\boxed{7", None),
    (r"\boxed{3}, no, \boxed{\frac{3}{4", "3"),
  ],
)
def test_a_number_is_read_whole_or_not_at_all(text, answer):
  assert extract_answer(text, numbers_only=True) == answer


@pytest.mark.parametrize(
  ("gold", "answer", "correct"),
  [
    ("4", r"\frac{3}{4}", False),
    (r"3\frac{1}{2}", "3.5", True),
    ("-7/2", "-3 1/2", True),
    ("15.5", r"3\frac{1}{2}", False),
    ("0.5", "\u00bd", True),
    ("-0.5", r"\frac{1}{-2}", True),
    ("12345", "12{,}345", True),
    ("12", "1 2", False),
    ("3", "3, 4", False),
    ("3", "x = 3", True),
    ("5", r"5\text{ cm}", True),
    ("5", "5m", False),
    ("5", r"5\pi", False),
    ("5", "5 million", False),
    (r"50\%", "0.5", True),
    ("50", r"50\%", True),
    ("50", "0.5", False),
    ("2500", r"2.5\times 10^3", True),
    ("1", "1e999999999", False),
    ("0", "1/0", False),
    ("9" * 5000, "9" * 5000, True),
    ("1", "9" * 5000, False),
  ],
)
def test_numbers_of_any_spelling_are_compared(gold, answer, correct):
  if math_answers.as_number(gold) is None:
    assert correct == (normalize(gold) == normalize(answer))
  else:
    assert _grade([(gold, answer)], "numbers")[0][0] == correct


def test_spelling_does_not_make_different_expressions_equal():
  assert normalize(r"\frac{a+b}{c}") != normalize("a+b/c")
  assert math_answers._quick("5 cm", "5 m") is None


def test_long_degenerate_replies_are_read_in_linear_time():
  for piece in (r"\boxed{", "the answer is x ", "1 ", "{", "$", "9", r"\frac{1}{", "(a "):
    began = time.monotonic()
    for numbers_only in (False, True):
      found = extract_answer(piece * 20_000, numbers_only=numbers_only)
      normalize(found or "")
    assert time.monotonic() - began < 5, piece


def _grade(pairs, checker="math_verify", **options):
  options = {"timeout_seconds": 60.0, "num_processes": 1} | options
  return [(g.correct, g.status) for g in grade(pairs, checker=checker, **options)]


def test_numbers_are_compared_without_a_package(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  pairs = [("18", "18.0"), ("18", "19"), ("1/2", "0.5"), ("3", None), ("3", "x")]
  assert _grade(pairs, "numbers") == [
    (True, "equal"),
    (False, "different"),
    (True, "equal"),
    (False, "no_answer"),
    (False, "different"),
  ]


def test_a_missing_package_is_named_and_there_is_no_silent_fallback(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  with pytest.raises(ValueError, match=r"pip install 'selfimprove_jax\[math\]'.*'numbers'"):
    _grade([("18", "18")])
  with pytest.raises(ValueError, match=r"'x\+1' is not a number; use the checker 'math_verify'"):
    _grade([("18", "18"), ("x+1", "x+1")], "numbers")
  with pytest.raises(ValueError, match=r"checker='sympy' is unknown"):
    _grade([], "sympy")


@_needs_math_verify
def test_expressions_are_compared():
  equal = [
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, 0.5\pi)"),
    (r"\{1,2,3\}", r"\{3,1,2\}"),
  ]
  different = [("[2,5)", "[2,5]"), ("x^2", "x^3"), ("4", r"\frac{8"), ("5", "five apples")]
  assert _grade([*equal, *different]) == [(True, "equal")] * 4 + [(False, "different")] * 4


@_needs_math_verify
def test_spellings_that_the_checker_reads():
  equal = [("5", r"5\text{ cm}"), ("3", "x=3"), ("7", "3+4"), ("x=3", "3")]
  assert _grade([*equal, ("1", "9" * 5000 + "x")]) == [(True, "equal")] * 4 + [(False, "error")]


@_needs_math_verify
def test_endless_comparisons_are_killed_and_the_others_continue():
  began = time.monotonic()
  hang = ("1", "9^{9^{9^{9}}}")
  found = _grade([hang, ("2^{10}", "1024"), hang], timeout_seconds=3.0)
  assert found == [(False, "timeout"), (True, "equal"), (False, "timeout")]
  assert time.monotonic() - began < 60  # equal pairs are compared once


def _verify_or_die(gold: str, answer: str) -> str:
  if gold == "x":
    os._exit(1)
  return "equal"


def _die(gold: str, answer: str) -> str:
  os._exit(1)


@_needs_math_verify
def test_a_process_that_dies_is_an_error_of_one_comparison(monkeypatch):
  monkeypatch.setattr(math_answers, "_verify", _verify_or_die)
  monkeypatch.setattr(math_answers, "_prepare_process", _nothing)
  pairs = [("x", "y"), ("a", "b"), ("x", "z")]
  found = math_answers.compare(pairs, timeout_seconds=60.0, num_processes=1)
  assert found == ["error", "equal", "error"]
  monkeypatch.setattr(math_answers, "_verify", _die)
  with pytest.raises(RuntimeError, match="does not start"):
    math_answers.compare(pairs, timeout_seconds=60.0, num_processes=1)


def _nothing() -> None:
  pass


def test_right_answers_of_gsm8k_and_math_are_extracted(real_data):
  import gzip

  with gzip.open(real_data / "evals" / "gsm8k.jsonl.gz", "rt") as file:
    solutions = [json.loads(line)["answer"] for line in file]
  golds = [solution.rpartition("####")[2].strip() for solution in solutions]
  found = [extract_answer(solution, numbers_only=True) for solution in solutions]
  assert all(correct for correct, _ in _grade(list(zip(golds, found)), "numbers"))
  with gzip.open(real_data / "evals" / "math500.jsonl.gz", "rt") as file:
    records = [json.loads(line) for line in file]
  boxed = [extract_answer(record["solution"], numbers_only=False) for record in records]
  same = [normalize(r["answer"]) == normalize(b) for r, b in zip(records, boxed)]
  assert sum(same) >= len(records) - 1
