import zipfile

import pytest

from selfimprove_jax.data.sources import SourceDocument
from selfimprove_jax.synthesis import units
from selfimprove_jax.synthesis.prompts import PromptSet

_VALUES = {
  units.PAIR: {"first": "ENTITY1", "second": "ENTITY2"},
  units.TRIPLET: {"first": "ENTITY1", "second": "ENTITY2", "third": "ENTITY3"},
  units.APPLY: {"strategy": "STRATEGY"},
  units.FOCAL: {"question": "QUESTION"},
}
_TASKS = {
  kind: " ".join(f"${name}" for name in _VALUES.get(kind, {})) or kind for kind in units.KINDS
}


@pytest.fixture(scope="module", params=["default", "small"])
def prompts(request):
  return PromptSet.load(request.param)


@pytest.fixture(scope="module")
def source():
  return SourceDocument("d", "A Title", "An Author", "1901", "Costs $5 and {x}.", ())


def test_prompts_of_all_kinds_begin_with_the_document_and_end_with_the_task(prompts, source):
  whole = {}
  for kind in units.KINDS:
    values = _VALUES.get(kind, {})
    messages, end = prompts.render(kind, source, **values)
    assert [message["role"] for message in messages] == ["system", "user"]
    whole[kind] = (messages[0]["content"] + messages[1]["content"], end)
    head = "Title: A Title\nAuthor: An Author\nYear: 1901\n\nCosts $5 and {x}."
    assert messages[1]["content"].startswith(head)
    task = whole[kind][0][end:]
    assert task.startswith("Task") and "Costs" not in task
    assert "A Title" in task
    assert all(value in task for value in values.values())
  beginnings = {text[:end] for text, end in whole.values()}
  assert len(beginnings) == 1 and len({text for text, _ in whole.values()}) == len(units.KINDS)


def test_what_a_document_lacks_is_left_out(prompts):
  messages, _ = prompts.render("entities", SourceDocument("d7", "", "", "", "Text.", ()))
  assert messages[1]["content"].startswith("Title: d7\n\nText.\n")


def test_a_missing_or_unknown_value_is_an_error(prompts, source):
  with pytest.raises(KeyError, match="second"):
    prompts.render("pair", source, first="x")
  with pytest.raises(ValueError, match="kind is 'pairs'"):
    prompts.render("pairs", source)


def test_the_small_set_is_shorter_and_has_examples(source):
  default, small = PromptSet.load("default"), PromptSet.load("small")
  for kind in units.KINDS:
    task = {}
    for one in (default, small):
      messages, end = one.render(kind, source, **_VALUES.get(kind, {}))
      task[one.name] = (messages[0]["content"] + messages[1]["content"])[end:]
    assert "Example" in task["small"] and "Example" not in task["default"]
    assert default.hash(kind) != small.hash(kind)


def test_a_hash_changes_with_its_texts_alone():
  tasks = dict(_TASKS)
  before = PromptSet("s", "system", tasks)
  after = PromptSet("s", "system", tasks | {"pair": "new $first $second"})
  assert before.hash("pair") != after.hash("pair") and before.hash("focal") == after.hash("focal")
  assert PromptSet("s", "other", tasks).hash("focal") != before.hash("focal")
  assert len(before.hash("pair")) == 12


@pytest.mark.parametrize("task", ["$first", "$first $second $thrid", "$first $second costs $5"])
def test_a_task_with_wrong_placeholders_is_refused(task):
  with pytest.raises(ValueError, match=r"'pair'.*must have \['first', 'second'\]"):
    PromptSet("s", "system", _TASKS | {"pair": task})


def test_a_set_that_lacks_a_kind_and_an_unknown_set_are_refused():
  with pytest.raises(ValueError, match="no task for the kind 'focal'"):
    PromptSet("s", "system", {kind: task for kind, task in _TASKS.items() if kind != "focal"})
  with pytest.raises(ValueError, match="no prompts 'smal'; there are 'default', 'small'"):
    PromptSet.load("smal")


def test_an_installed_package_has_the_prompts(tmp_path):
  """The prompts are loaded from a zip file, as an importer without a folder gives them."""
  import importlib.resources
  import pathlib
  import subprocess
  import sys
  import tomllib

  import selfimprove_jax

  root = pathlib.Path(selfimprove_jax.__file__).parent
  project = tomllib.loads((root.parent / "pyproject.toml").read_text())
  globs = project["tool"]["setuptools"]["package-data"]["selfimprove_jax.synthesis.prompts"]
  folder = pathlib.Path(str(importlib.resources.files("selfimprove_jax.synthesis.prompts")))
  data = {path for pattern in globs for path in folder.glob(pattern)}
  assert data == set(folder.rglob("*.txt"))
  with zipfile.ZipFile(tmp_path / "package.zip", "w") as packed:
    for path in [*root.rglob("*.py"), *data]:
      packed.write(path, path.relative_to(root.parent))
  code = (
    f"import sys; sys.path.insert(0, {str(tmp_path / 'package.zip')!r})\n"
    "from selfimprove_jax.synthesis import prompts\n"
    "assert '.zip' in prompts.__file__\n"
    "print(prompts.PromptSet.load('small').hash('pair'))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={}
  )
  assert done.stdout.strip() == PromptSet.load("small").hash("pair"), done.stderr
