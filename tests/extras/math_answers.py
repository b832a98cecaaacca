"""Checks the extra `math` in an environment that has nothing else."""

import importlib.util

from selfimprove_jax.reasoning import math_answers


def main() -> None:
  assert importlib.util.find_spec("torch") is None, "torch is installed: not a clean check"
  grades = math_answers.grade(
    [(r"\frac{1}{2}", "0.5"), (r"\sqrt{2}", r"\sqrt{3}"), ("4", None)],
    checker="math_verify",
    timeout_seconds=30.0,
    num_processes=1,
  )
  assert [grade.correct for grade in grades] == [True, False, False], grades
  print("math: three answers were graded")


if __name__ == "__main__":
  main()
