"""Whole runs by the real command line: what they print and write, and how a failure ends them."""

import json
import shutil

import pytest

pytestmark = pytest.mark.slow

_SMOKE = "--config=configs/sbp_quick.py:smoke"
_EARLY = ("documents", "tokenizer", "tokens")


def _copy_early(smoke, folder):
  """The early stages of the smoke run, which are those of any config that changes later ones."""
  for name in _EARLY:
    shutil.copytree(smoke.folder / name, folder / name)
  return folder


def _assert_refused(process, *told):
  assert process.returncode == 1, process.stdout + process.stderr
  for text in told:
    assert text in process.stdout + process.stderr
  assert "Traceback" not in process.stdout + process.stderr


def test_the_smoke_run_prints_the_table_and_the_path_of_the_report(smoke):
  lines = smoke.process.stdout.splitlines()
  assert lines[-1] == str(smoke.folder / "report" / "report.html")
  table = {line.split("  ")[0] for line in lines}
  assert {"repeated", "SBP", "unconditional samples", "oracle"} <= table
  assert (smoke.folder / "report" / "report.html").stat().st_size > 20_000
  assert smoke.seconds < 600


def test_every_long_stage_shows_its_progress(smoke):
  shown = smoke.process.stdout + smoke.process.stderr
  for label in ("documents", "tokens", "seed", "samples/sbp", "synthesizer/nearest", "arms/oracle"):
    assert f"\n{label}  " in "\n" + shown, label


def test_the_report_has_every_arm_at_equal_predicted_tokens_with_standard_errors(smoke):
  report = json.loads((smoke.folder / "report" / "report.json").read_text())
  arms = report["arms"]
  assert {"baseline", "sbp", "unconditional", "oracle", "baseline_all_in"} == arms.keys()
  for arm in arms.values():
    assert arm["evals"]
    for result in arm["evals"].values():
      assert result["value"] > 0
      assert result["stderr"] > 0
      assert isinstance(result["unit"], str)
  equal = [arms[name] for name in ("baseline", "sbp", "unconditional", "oracle")]
  targets = [number for arm in equal for number in arm["train_targets"]]
  one_step = targets[0] / equal[0]["steps"]
  assert max(targets) - min(targets) <= 2 * max(0.005 * targets[0], one_step)
  assert len(targets) == 6  # the baseline and SBP are trained twice
  assert arms["baseline_all_in"]["train_tokens"] > arms["baseline"]["train_tokens"]


def test_the_report_says_what_made_it(smoke):
  report = json.loads((smoke.folder / "report" / "report.json").read_text())
  assert report["config"] == json.loads((smoke.folder / "config.json").read_text())
  assert {"python", "jax", "selfimprove_jax"} <= report["versions"].keys()
  assert _SMOKE in report["command"]
  assert all(stage["seconds"] > 0 for stage in report["stages"])
  assert report["pairs"]["recall"]["value"] > 0.9


def test_each_synthetic_source_of_the_smoke_run_keeps_rows_to_train_on(smoke):
  for source in ("sbp", "unconditional"):
    manifest = json.loads((smoke.folder / "synthetic" / source / "manifest.json").read_text())
    assert manifest["summary"]["rows"]["records"] >= 1


def test_the_untuned_synthesizer_of_the_smoke_run_is_measured_too(smoke):
  folder = smoke.folder / "synthesizer" / "nearest"
  summary = json.loads((folder / "manifest.json").read_text())["summary"]
  curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
  assert summary["untuned"]["validation"] == curve[0]["validation/loss"]
  assert summary["best_validation"] <= summary["untuned"]["validation"]
  tuned, untuned = (found["conditioning"] for found in (summary, summary["untuned"]))
  assert tuned["num_pairs"] == untuned["num_pairs"] > 0
  assert tuned["true_nll"] != untuned["true_nll"]


def test_a_finished_run_runs_nothing_again(smoke, smoke_copy, run_command, data_files):
  process = run_command(_SMOKE, f"--workdir={smoke_copy}")
  assert process.returncode == 0, process.stderr
  assert process.stdout.count(": complete\n") == len(_stage_names(smoke_copy))
  assert (smoke_copy / "timings.jsonl").read_bytes() == (
    smoke.folder / "timings.jsonl"
  ).read_bytes()
  assert data_files(smoke_copy) == data_files(smoke.folder)


def _stage_names(folder):
  report = json.loads((folder / "report" / "report.json").read_text())
  return [stage["name"] for stage in report["stages"]]


def test_another_config_in_the_same_workdir_is_refused_with_the_difference(smoke, run_command):
  before = {p: p.stat().st_mtime_ns for p in sorted(smoke.folder.rglob("*"))}
  process = run_command(
    _SMOKE, f"--workdir={smoke.folder}", "--config.pairs.filters.max_jaccard=.4"
  )
  _assert_refused(process, "made with another config", "pairs: filters.max_jaccard: 0.3 -> 0.4")
  assert {p: p.stat().st_mtime_ns for p in sorted(smoke.folder.rglob("*"))} == before


def test_dry_run_prints_every_stage_and_makes_nothing(smoke, run_command, tmp_path):
  process = run_command(
    _SMOKE, f"--workdir={tmp_path / 'run'}", "--dry_run", "--device=v5p", "--num_devices=4"
  )
  assert process.returncode == 0, process.stderr
  rows = {line.split()[0] for line in process.stdout.splitlines() if line.strip()}
  assert set(_stage_names(smoke.folder)) <= rows
  assert "4 x v5p at 40%" in process.stdout
  assert not (tmp_path / "run").exists()
  _assert_refused(
    run_command(_SMOKE, "--dry_run", "--device=v99"), "--device=v99 is unknown", "h100"
  )


def test_some_stages_can_be_run_and_a_missing_input_is_named(run_command, smoke, tmp_path):
  run = _copy_early(smoke, tmp_path / "run")
  shutil.rmtree(run / "tokens")
  process = run_command(_SMOKE, f"--workdir={run}", "--stages=embeddings,pairs")
  _assert_refused(process, f"artifact {run / 'tokens'} is missing: run the stage that writes it")
  process = run_command(_SMOKE, f"--workdir={run}", "--stages=tokens,embeddings")
  assert process.returncode == 0, process.stdout + process.stderr
  assert (run / "embeddings" / "manifest.json").exists()
  assert not (run / "pairs" / "manifest.json").exists()
  assert not (run / "report").exists()


def test_a_bad_line_ends_the_run_and_once_mended_the_command_continues(run_command, tmp_path):
  corpus, config = tmp_path / "corpus.jsonl", tmp_path / "config.py"
  lines = [
    json.dumps({"id": f"d{i}", "text": " ".join(f"word{i * 20 + j}" for j in range(20))})
    for i in range(100)
  ]
  corpus.write_text("\n".join([*lines[:9], "{", *lines[10:]]))
  config.write_text(
    "from configs import sbp_quick\n"
    "from selfimprove_jax.data.corpora import JsonlConfig\n"
    "from selfimprove_jax.runtime.config import page\n"
    "def get_config():\n"
    "  c = sbp_quick.get_config('smoke')\n"
    f"  c.corpus.source = page(JsonlConfig, paths=({str(corpus)!r},))\n"
    "  return c\n"
  )
  arguments = (f"--config={config}", f"--workdir={tmp_path / 'run'}", "--stages=documents")
  process = run_command(*arguments)
  _assert_refused(process, f"documents: CorpusError: {corpus}, line 10: not JSON", "exit code 1")
  corpus.write_text("\n".join(lines))
  assert run_command(*arguments).returncode == 0


def test_a_mesh_that_does_not_fit_is_refused_and_runs_on_more_devices(
  smoke, run_command, subprocess_options, tmp_path
):
  run = _copy_early(smoke, tmp_path / "run")
  arguments = (_SMOKE, f"--workdir={run}", "--stages=seed", "--config.mesh.data=2")
  _assert_refused(run_command(*arguments), "stage seed.mesh: data=2", "and there are 1")
  flags = f"{subprocess_options['env']['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
  process = run_command(*arguments, env={"XLA_FLAGS": flags})
  assert process.returncode == 0, process.stdout + process.stderr
  assert (run / "seed" / "manifest.json").exists()


def test_a_stage_that_fails_ends_the_run_with_its_message_and_its_sibling_saves(
  smoke, run_command, tmp_path
):
  run = _copy_early(smoke, tmp_path / "run")
  arguments = (
    *(_SMOKE, f"--workdir={run}", "--stages=seed,arms/baseline"),
    *("--config.arms.baseline.weight_decay=1e30", "--config.seed_model.total_tokens=4000000"),
  )
  process = run_command(*arguments)
  _assert_refused(
    process,
    "arms/baseline: LossIsNotFiniteError: arms/baseline: step",
    "stage arms/baseline ended with exit code 1",
    "seed: stopped at step",
  )
  assert "Traceback" in (run / "logs" / "arms-baseline.log").read_text()
  assert any(path.name.isdigit() for path in (run / "seed" / "checkpoints").iterdir())
  assert not (run / "seed" / "manifest.json").exists()


def test_damage_is_refused_where_it_is_read_and_mended_with_verify(
  smoke, smoke_copy, run_command, data_files
):
  shard = smoke_copy / "samples" / "sbp" / "00001.jsonl"
  whole = shard.read_bytes()
  shard.write_bytes(whole.replace(b"a", b"b", 1))
  (smoke_copy / "tokens" / "test.array_record").write_bytes(b"cut short")
  shutil.rmtree(smoke_copy / "synthetic" / "sbp")
  arguments = (_SMOKE, f"--workdir={smoke_copy}")
  process = run_command(*arguments, "--stages=tokens,synthetic/sbp")
  _assert_refused(process, "00001.jsonl is damaged: its SHA-256", "--verify")
  assert "tokens: test.array_record is damaged and is made again" in process.stdout
  process = run_command(*arguments, "--verify")
  assert process.returncode == 0, process.stdout + process.stderr
  assert "samples/sbp: 00001.jsonl is damaged and will be made again" in process.stdout
  assert data_files(smoke_copy) == data_files(smoke.folder)
  timed = [
    json.loads(line)["stage"] for line in (smoke_copy / "timings.jsonl").read_text().splitlines()
  ]
  again = timed[len((smoke.folder / "timings.jsonl").read_text().splitlines()) :]
  assert set(again) == {"tokens", "samples/sbp", "synthetic/sbp"}


def test_a_truncated_checkpoint_of_a_finished_stage_is_refused_with_what_to_do(
  smoke_copy, run_command
):
  shutil.rmtree(smoke_copy / "samples" / "unconditional")
  files = [path for path in (smoke_copy / "seed" / "checkpoints").rglob("*") if path.is_file()]
  for path in files:
    if "params" in path.parts and path.stat().st_size > 1000:
      path.write_bytes(path.read_bytes()[:-200])
  process = run_command(_SMOKE, f"--workdir={smoke_copy}", "--stages=samples/unconditional")
  _assert_refused(
    process, f"Delete the folder {smoke_copy / 'seed'} and run the same command again"
  )


def test_show_prints_pairs_and_syntheses_with_their_seeds(smoke, run_command):
  process = run_command("show", f"--workdir={smoke.folder}")
  assert process.returncode == 0, process.stderr
  for text in ("--- d1  numpy/", "similarity 0.", "--- Seed  numpy/", "--- Synthesis  sbp"):
    assert text in process.stdout
