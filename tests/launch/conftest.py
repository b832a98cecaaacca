"""Launch files whose units are a few lines of Python, and the launcher's command line."""

import os
import pathlib
import subprocess
import sys

import pytest

_REPO = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = _REPO / "tools" / "launch.py"
# Its own page, because those in configs/ import the pipelines, which takes seconds.
_PAGE = """
import ml_collections as mlc

def get_config(variant):
  if variant != "smoke":
    raise ValueError(f"variant {variant!r} is unknown")
  return mlc.ConfigDict(
    dict(seed=0, title="A run", total_tokens=10, arms=dict(sbp=dict(weight_decay=1.0)))
  )
"""


@pytest.fixture
def page(tmp_path) -> str:
  """A config of a few knobs, as `--config` names it."""
  path = tmp_path / "page.py"
  path.write_text(_PAGE)
  return f"{path}:smoke"


@pytest.fixture
def launch_file(tmp_path, page):
  """Writes a launch file: three arms over two seeds, whose units run a script."""

  def write(script: str, **changes) -> pathlib.Path:
    unit = tmp_path / "unit.py"
    unit.write_text(script)
    arguments = {
      "name": "sweep",
      "config": page,
      "arms": {"a": {}, "b": {"total_tokens": 999}, "c": {"arms.sbp.weight_decay": 0.5}},
      "seeds": (0, 1),
      "command": (sys.executable, str(unit)),
    }
    resource = changes.pop("resource", "cpu()")
    text = ", ".join(f"{key}={value!r}" for key, value in (arguments | changes).items())
    path = tmp_path / "launch_file.py"
    path.write_text(
      "from selfimprove_jax.launch.experiment import Experiment\n"
      "from selfimprove_jax.launch.resource import cpu, gpu, tpu\n"
      "def get_experiment():\n"
      f"  return Experiment({text}, resource={resource})\n"
    )
    return path

  return write


@pytest.fixture
def launch_argv(tmp_path):
  """The launcher's command line, with a root under the test's folder."""

  def make(path, *arguments, python=sys.executable) -> list[str]:
    root = f"--root={tmp_path / 'runs'}"
    return [str(python), str(LAUNCH), f"--experiment={path}", root, *map(str, arguments)]

  return make


@pytest.fixture
def launch(launch_argv):
  """Runs the launcher to its end."""

  def run(path, *arguments, env=None, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
      launch_argv(path, *arguments, **options),
      cwd=_REPO,
      env=os.environ | (env or {}),
      capture_output=True,
      text=True,
      timeout=120,
    )

  return run


@pytest.fixture
def run_folder(tmp_path) -> pathlib.Path:
  """Where the units of the launch file run."""
  return tmp_path / "runs" / "sweep"
