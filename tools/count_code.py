"""Counts the package's code: lines, comments, return types, long functions, reading paths.

  python tools/count_code.py                              # the whole package, and each of its parts
  python tools/count_code.py --path main.py runs/runner.py runs/stage.py   # files to read in order
  python tools/count_code.py --root=../other/selfimprove_jax               # another checkout

Lines are those of the files, blank lines included. The share of comment lines is that of lines that
hold nothing but a comment. A function has a return type if its signature says one.
"""

import argparse
import ast
import io
import pathlib
import tokenize
from collections.abc import Iterator

_PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "selfimprove_jax"
_LONG_FUNCTION = 80


def comment_lines(source: str) -> int:
  """Returns the number of lines that hold nothing but a comment."""
  tokens = tokenize.generate_tokens(io.StringIO(source).readline)
  return sum(t.type == tokenize.COMMENT and not t.line[: t.start[1]].strip() for t in tokens)


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
  """Yields every function and method, nested ones too."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      yield node


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
  """Returns the lines of a function from its `def` to its end, docstring included."""
  assert function.end_lineno is not None
  return function.end_lineno - function.lineno + 1


def _row(name: str, files: list[pathlib.Path]) -> str:
  sources = [file.read_text(encoding="utf-8") for file in files]
  lines = sum(len(source.splitlines()) for source in sources)
  found = [function for source in sources for function in functions(source)]
  untyped = sum(f.returns is None and f.name != "__init__" for f in found)
  longest = max(map(num_lines, found), default=0)
  comments = sum(map(comment_lines, sources))
  return (
    f"{name:<28}{len(files):>6}{lines:>8}{comments / max(lines, 1):>10.1%}{len(found):>11}"
    f"{untyped / max(len(found), 1):>14.1%}{longest:>9}"
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--root", type=pathlib.Path, default=_PACKAGE, help="the package's folder")
  parser.add_argument(
    "--path", nargs="+", default=[], help="files under the root that one reads in this order"
  )
  arguments = parser.parse_args()
  root = arguments.root
  if missing := [name for name in arguments.path if not (root / name).is_file()]:
    parser.error(f"{root} has no file {missing[0]}")
  print(
    f"{'':<28}{'files':>6}{'lines':>8}{'comments':>10}{'functions':>11}{'no ret. type':>14}"
    f"{'longest':>9}"
  )
  if arguments.path:
    for name in arguments.path:
      print(_row(name, [root / name]))
    print(_row("together", [root / name for name in arguments.path]))
    return
  for part in sorted(root.iterdir()):
    files = [part] if part.suffix == ".py" else sorted(part.rglob("*.py"))
    if files and part.name != "__pycache__":
      print(_row(part.name, files))
  files = sorted(root.rglob("*.py"))
  print(_row("together", files))
  for file in files:
    for function in functions(file.read_text(encoding="utf-8")):
      if num_lines(function) > _LONG_FUNCTION:
        print(f"{file.relative_to(root)}:{function.lineno} {function.name} has more than 80 lines")


if __name__ == "__main__":
  main()
