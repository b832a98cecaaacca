"""The command line, run in this process with a toy pipeline (whole runs: test_whole_runs.py)."""

import json
import sys

import pytest
from absl import app, flags

from selfimprove_jax import main as program
from selfimprove_jax import pipelines
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runtime import distributed, preemption

_TOY = """
from selfimprove_jax.report.blocks import Report, Section, Text
from selfimprove_jax.runs.runner import RuntimeConfig
from selfimprove_jax.runtime.config import section, to_json
from selfimprove_jax.runtime.partitioning import MeshConfig
from tests.runs.toy import ValueConfig, stage


@section
class Config:
  pipeline: str = "toy"
  title: str = "A toy"
  runtime: RuntimeConfig = RuntimeConfig()
  mesh: MeshConfig = MeshConfig()
  first: ValueConfig = ValueConfig()
  second: ValueConfig = ValueConfig()


def stages(config):
  first, second = vars(config.first), vars(config.second)
  return [stage("a/one", **first), stage("b", "a/one", **second)]


def report(run):
  lead = f"total {run.artifact('b').summary['total']}" if run.has("b") else "b is not there"
  sections = (Section("Examples", (Text("an example"),)),)
  return Report(run.config.title, run.command, lead, sections, {"config": to_json(run.config)})
"""
_PAGE = """
from selfimprove_jax.pipelines import toy
from selfimprove_jax.runtime.config import page


def get_config(variant="small"):
  if variant != "small":
    raise ValueError(f"variant {variant!r} is unknown; there are ['small']")
  return page(toy.Config)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch, capfd):
  """Runs the command line with a pipeline of two stages; gives exit code and what it printed."""
  folder = tmp_path / "pipelines" / "toy"
  folder.mkdir(parents=True)
  (folder / "__init__.py").write_text(_TOY)
  page = tmp_path / "page.py"
  page.write_text(_PAGE)
  monkeypatch.setattr(pipelines, "__path__", [*pipelines.__path__, str(folder.parent)])
  monkeypatch.delitem(sys.modules, "selfimprove_jax.pipelines.toy", raising=False)
  monkeypatch.delattr(pipelines, "toy", raising=False)
  # Both belong to a process of its own: JAX is already running here, and SIGTERM must end pytest.
  monkeypatch.setattr(distributed, "initialize", lambda **options: None)
  monkeypatch.setattr(preemption, "install", lambda: None)

  def run(*arguments, config=str(page)):
    config = [] if config is None else [f"--config={config}"]
    argv = ["main.py", *config, f"--workdir={tmp_path / 'run'}", "--compilation_cache=", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    names = set(flags.FLAGS)
    code = 0
    try:
      program.main(program._parse_flags(argv))
    except SystemExit as leave:
      code = leave.code
    finally:
      for name in set(flags.FLAGS) - names:  # the overrides of this page
        delattr(flags.FLAGS, name)
      flags.FLAGS.unparse_flags()
      for name in (
        "config",
        "workdir",
        "stages",
        "dry_run",
        "device",
        "num_devices",
        "verify",
        "overwrite",
      ):
        flags.FLAGS[name].unparse()
    out = capfd.readouterr()
    if isinstance(code, str):  # what sys.exit would print
      return 1, out.out + out.err + code
    return code, out.out + out.err

  run.folder = tmp_path / "run"
  return run


def test_a_run_makes_its_stages_records_its_config_and_writes_the_report(toy):
  code, told = toy("--config.first.value=3", "--config.title=Numbers")
  assert code == 0, told
  assert told.splitlines()[-1] == str(toy.folder / "report" / "report.html")
  assert "total 4" in told
  written = json.loads((toy.folder / "report" / "report.json").read_text())
  assert written["config"] == json.loads((toy.folder / "config.json").read_text())
  assert written["config"]["first"]["value"] == 3
  assert "selfimprove_jax.main" in written["command"]
  assert "--config.title=Numbers" in written["command"]


def test_overwrite_begins_again_with_another_config(toy):
  assert toy()[0] == 0
  (toy.folder / "a" / "one" / "manifest.json").write_text("{")  # a damaged run is one too
  (toy.folder / "logs").mkdir()
  code, told = toy("--config.second.value=5")
  assert (code, "was made with another config" in told) == (1, True)
  code, told = toy("--config.second.value=5", "--overwrite")
  assert code == 0, told
  assert "complete" not in told
  assert artifacts.open_artifact(toy.folder / "b").summary == {"total": 6}
  assert not (toy.folder / "logs").exists()


def test_overwrite_of_a_folder_that_is_not_there_begins_a_run(toy):
  code, told = toy("--overwrite")
  assert code == 0, told


@pytest.mark.parametrize("other", ["notes.txt", "a/notes.txt", "data/corpus.jsonl"])
def test_overwrite_refuses_a_folder_with_other_files_and_deletes_nothing(toy, other):
  assert toy()[0] == 0
  (toy.folder / other).parent.mkdir(exist_ok=True)
  (toy.folder / other).write_text("mine")
  before = {path: path.stat().st_mtime_ns for path in toy.folder.rglob("*")}
  code, told = toy("--overwrite")
  assert (code, f"{toy.folder / other} is no part of a run" in told) == (1, True)
  assert {path: path.stat().st_mtime_ns for path in toy.folder.rglob("*")} == before


@pytest.mark.parametrize("name", ["config.json", "model/config.json"])
def test_overwrite_refuses_a_folder_that_holds_models(toy, name):
  (toy.folder / name).parent.mkdir(parents=True)
  (toy.folder / name).write_text('{\n "architectures": []\n}\n')
  code, told = toy("--overwrite")
  assert (code, "holds no run" in told) == (1, True)
  assert (toy.folder / name).exists()


@pytest.mark.parametrize("argument", ["show", "--dry_run"])
def test_overwrite_goes_with_runs_only(toy, argument):
  with pytest.raises(app.UsageError, match="--overwrite deletes the run"):
    toy("--overwrite", argument)


def test_retry_failed_of_a_run_without_failures_says_so_and_continues(toy):
  code, told = toy("--retry_failed")
  assert code == 0, told
  assert "--retry_failed: nothing has failed" in told


@pytest.mark.parametrize("argument", ["show", "--dry_run", "--overwrite"])
def test_retry_failed_goes_with_runs_only(toy, argument):
  with pytest.raises(app.UsageError, match="--retry_failed continues a run"):
    toy("--retry_failed", argument)


def test_another_title_refuses_nothing_and_is_in_the_report(toy):
  assert toy()[0] == 0
  code, told = toy("--config.title=Another")
  assert code == 0, told
  assert "a/one: complete" in told
  assert json.loads((toy.folder / "config.json").read_text())["title"] == "Another"
  assert "Another" in (toy.folder / "report" / "report.html").read_text()


def test_another_config_of_a_stage_is_refused_once_it_is_complete(toy):
  assert toy("--stages=a")[0] == 0
  code, told = toy("--config.first.value=3")
  assert code == 1
  assert "a/one: value: 1 -> 3" in told


def test_a_run_that_has_made_nothing_takes_another_config(toy):
  assert toy("--config.first.fails=True")[0] == 1
  code, told = toy("--config.first.value=3")
  assert code == 0, told
  assert "a/one: begun again, since it was begun with another config" in told
  assert "total 4" in told


def test_a_run_of_some_stages_makes_no_report(toy):
  code, told = toy("--stages=a")
  assert code == 0, told
  assert artifacts.has_manifest(toy.folder / "a/one")
  assert not (toy.folder / "b").exists()
  assert not (toy.folder / "report").exists()


def test_show_reports_an_unfinished_run_with_examples(toy):
  assert toy("--stages=a")[0] == 0
  code, told = toy("show", config=None)
  assert code == 0, told
  assert "b is not there" in told
  assert "an example" in told


def test_show_of_a_folder_without_a_run_names_it(toy):
  code, told = toy("show", config=None)
  assert code == 1
  assert f"{toy.folder} holds no run" in told


def test_dry_run_prints_the_stages_and_makes_nothing(toy):
  code, told = toy("--dry_run", "--device=v5p", "--num_devices=4")
  assert code == 0, told
  assert {"a/one", "b", "total"} <= {line.split()[0] for line in told.splitlines() if line}
  assert "4 x v5p at 40%" in told
  assert not toy.folder.exists()


def test_dry_run_of_some_stages_plans_only_them(toy):
  code, told = toy("--dry_run", "--stages=b")
  assert code == 0, told
  assert "\nb " in told
  assert "\na/one" not in told


@pytest.mark.parametrize(
  ("arguments", "told"),
  [
    (["--stages=a/on"], "--stages=a/on: there is no such stage; did you mean 'a/one'? There are ["),
    (["--config.runtime.parallel_stages=0"], "runtime.parallel_stages=0: must be greater than or"),
    (
      ["--config.first.vale=3"],
      "--config.first.vale=3: first has no 'vale'; did you mean 'value'?",
    ),
    (
      ["--config.frst.value=3"],
      "--config.frst.value=3: the page has no 'frst'; did you mean 'first",
    ),
    (["--config.title.x=3"], "--config.title.x=3: title is a value, not a section"),
    (["--config.first.value=much"], "flag --config.first.value=much: invalid literal for int()"),
    (["--config.pipeline=to"], "pipeline='to': there is no such pipeline; did you mean 'toy'?"),
    (["--wrokdir=x"], "Unknown command line flag 'wrokdir'. Did you mean: workdir ?"),
    (["--num_devices=0"], "num_devices"),
  ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_mistake_on_the_command_line_is_refused_before_anything_runs(
  toy, arguments, told, dry_run
):
  code, found = toy(*arguments, *(["--dry_run"] if dry_run else []))
  assert code == 1
  assert told in found
  assert "Traceback" not in found
  assert not toy.folder.exists()


def test_dry_run_refuses_a_device_that_it_does_not_know(toy):
  code, told = toy("--dry_run", "--device=h10")
  assert code == 1
  assert "--device=h10 is unknown; did you mean 'h100'? There are ['a100'" in told


def test_a_mesh_that_does_not_fit_says_which_flags_plan_for_other_devices(toy):
  code, told = toy("--dry_run", "--config.mesh.data=5")
  assert code == 1
  assert "mesh: data=5 needs 5 devices, and there are 8" in told
  assert "Pass --num_devices" in told
  assert toy("--dry_run", "--config.mesh.data=5", "--num_devices=5")[0] == 0


def test_a_run_needs_a_folder_and_a_page(toy):
  with pytest.raises(app.UsageError, match="--workdir is missing"):
    toy("--workdir=")
  with pytest.raises(app.UsageError, match="--config is missing"):
    toy(config=None)
  with pytest.raises(app.UsageError, match="unknown arguments"):
    toy("shw")


def test_an_unknown_variant_is_refused_in_one_line_with_those_there_are(toy, tmp_path):
  code, told = toy(config=f"{tmp_path / 'page.py'}:smal")
  assert code == 1
  (line,) = told.strip().splitlines()
  assert line.endswith("page.py:smal: variant 'smal' is unknown; there are ['small']")


def test_a_key_that_no_section_reads_is_refused_in_a_page_too(toy, tmp_path):
  (tmp_path / "page.py").write_text(
    f"{_PAGE.replace('get_config', 'whole')}\n\n"
    "def get_config():\n"
    "  made = whole()\n"
    "  made.first.vale = 3\n"
    "  return made\n"
  )
  code, told = toy()
  assert code == 1
  assert "first.vale=3: there is no such knob; did you mean 'value'?" in told


def test_a_page_that_is_not_there_is_named(toy):
  code, told = toy(config="configs/not_there.py")
  assert code == 1
  assert "configs/not_there.py" in told
