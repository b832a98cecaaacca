"""Structure: imports go down only and are quick, functions are short, every knob is read."""

import ast
import pathlib
import subprocess
import sys
import time

import pytest

import selfimprove_jax

_PACKAGE = pathlib.Path(selfimprove_jax.__file__).parent
_FLOORS = {
  "runtime": 0,
  "runs": 1,
  **dict.fromkeys(("data", "models", "report"), 2),
  **dict.fromkeys(("retrieval", "sampling"), 3),
  **dict.fromkeys(("language_models", "training"), 4),
  "synthesis": 5,
  **dict.fromkeys(("evaluation", "reasoning"), 6),
  "research": 7,
  **dict.fromkeys(("pipelines", "launch"), 8),
  **dict.fromkeys(("main", "serving"), 9),
}
_HEAVY = {
  "tensorflow",
  "scann",
  "sklearn",
  "transformers",
  "matplotlib",
  "datasets",
  "seqio",
  "torch",
  "gguf",
  "openai",
  "llguidance",
  "math_verify",
  "httpx",
  "jsonschema",
  "aiolimiter",
  "pebble",
  "submitit",
  "xmanager",
}
_OF_THE_SERVER = {"fastapi", "prometheus_client", "starlette", "uvicorn"}


def _part(path):
  """The part of the package that a file belongs to: `data`, `main`."""
  return path.relative_to(_PACKAGE).parts[0].removesuffix(".py")


def _name(path):
  parts = path.relative_to(_PACKAGE.parent).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


_FILES = {_name(path): path for path in sorted(_PACKAGE.rglob("*.py"))}
_TREES = {name: ast.parse(path.read_text()) for name, path in _FILES.items()}


def _imported(nodes):
  """Dotted names of what is imported; `from a import b` gives a.b where that is a module."""
  for node in nodes:
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "relative import"
      for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        yield inner if inner in _FILES else node.module


def _all_imports(path):
  return set(_imported(ast.walk(ast.parse(path.read_text()))))


def _module_level_imports(path):
  """Modules that importing the file imports: not those in functions or for type checkers."""

  def nodes(body):
    for node in body:
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        continue
      if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        continue
      yield node
      yield from nodes(ast.iter_child_nodes(node))

  return set(_imported(nodes(ast.parse(path.read_text()).body)))


@pytest.mark.parametrize("name", sorted(set(_FILES) - {"selfimprove_jax"}))
def test_a_file_imports_only_from_floors_below(name):
  part = _part(_FILES[name])
  assert part in _FLOORS, f"{part} has no floor"
  for imported in _all_imports(_FILES[name]):
    if imported.startswith("selfimprove_jax."):
      other = _part(_FILES[imported])
      assert other == part or _FLOORS[other] < _FLOORS[part], f"{name} imports {imported}"


def test_no_imports_go_in_a_circle():
  graph = {name: _all_imports(path) & _FILES.keys() for name, path in _FILES.items()}
  for name, tree in _TREES.items():
    # `from package import module` reads the package's own names too.
    packages = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    graph[name] |= (packages & _FILES.keys()) - {name}
  done: set[str] = set()

  def visit(name, above):
    assert name not in above, " -> ".join([*above[above.index(name) :], name])
    if name not in done:
      for other in sorted(graph[name]):
        visit(other, [*above, name])
      done.add(name)

  for name in graph:
    visit(name, [])


@pytest.mark.parametrize("name", sorted(_FILES))
def test_heavy_libraries_are_imported_in_the_functions_that_need_them(name):
  tops = {imported.split(".")[0] for imported in _module_level_imports(_FILES[name])}
  assert not tops & (_HEAVY if _part(_FILES[name]) == "serving" else _HEAVY | _OF_THE_SERVER)


@pytest.mark.parametrize("name", sorted(_FILES))
def test_no_function_is_longer_than_80_lines(name):
  lengths = {
    node.name: node.end_lineno - node.lineno + 1
    for node in ast.walk(_TREES[name])
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
  }
  assert {function: n for function, n in lengths.items() if n > 80} == {}


def _is_section(node):
  return isinstance(node, ast.ClassDef) and any(
    ast.unparse(decorator).split(".")[-1] == "section" for decorator in node.decorator_list
  )


_SECTIONS = {
  f"{name}.{node.name}": node
  for name, tree in _TREES.items()
  for node in ast.walk(tree)
  if _is_section(node)
}
_READ = {
  node.attr
  for tree in _TREES.values()
  for node in ast.walk(tree)
  if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
}


@pytest.mark.parametrize("name", sorted(_SECTIONS))
def test_every_field_of_a_config_section_is_read_somewhere(name):
  fields = {
    node.target.id
    for node in _SECTIONS[name].body
    if isinstance(node, ast.AnnAssign) and not _is_tag(node.annotation)
  }
  body = ast.unparse(_SECTIONS[name])
  if "asdict(self)" not in body and "fields(self)" not in body:  # those read every field
    assert fields - _READ == set()


def _is_tag(annotation):
  """A Literal of one value tells the sections of a union apart; pydantic reads it."""
  return (
    isinstance(annotation, ast.Subscript)
    and ast.unparse(annotation.value) == "Literal"
    and isinstance(annotation.slice, ast.Constant)
  )


def _seconds(*arguments, subprocess_options):
  began = time.monotonic()
  process = subprocess.run([sys.executable, *arguments], capture_output=True, **subprocess_options)
  assert process.returncode == 0, process.stderr
  return time.monotonic() - began, process.stdout


@pytest.mark.parametrize(
  ("code", "limit"),
  [
    ("import selfimprove_jax", 0.5),
    (
      "import contextlib, sys, runpy\n"
      "sys.argv = ['main', '--help']\n"
      "with contextlib.suppress(SystemExit):\n"
      "  runpy.run_module('selfimprove_jax.main', run_name='__main__')",
      3.0,
    ),
  ],
  ids=["import", "help"],
)
def test_import_and_help_are_quick_and_import_nothing_heavy(code, limit, subprocess_options):
  code += "\nimport sys; print('LOADED', *sys.modules)"
  least = float("inf")
  for _ in range(3):
    seconds, output = _seconds("-c", code, subprocess_options=subprocess_options)
    least = min(least, seconds)
  loaded = set(output.rpartition("LOADED")[2].split())
  assert not loaded & ({"jax", "numpy"} | _HEAVY)
  assert least < 3 * limit  # of three tries, with room for a busy machine
