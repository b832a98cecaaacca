"""The comparison of test-time compute, on a tiny chat model of random weights."""

import copy
import functools
import gzip
import json
import pathlib
import shutil

import pytest
import tokenizers
import torch
import transformers

from configs import budget_forcing as config_page
from selfimprove_jax import artifacts, partitioning
from selfimprove_jax.pipelines import budget_forcing_model, budget_forcing_report, runner
from selfimprove_jax.progress import Progress
from selfimprove_jax.training import preemption

_QUIET = Progress(quiet=True)
_CHAT = (
  "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
  "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QUESTIONS = [
  ("How many legs have two cats?", "Four and four.\n#### 8"),
  ("What is 600 and 600? <|im_end|>", "#### 1,200"),
  ("What is 3 less than 1?", "#### -2"),
]


@pytest.fixture(scope="module", autouse=True)
def on_one_device(one_device_mesh):
  """What runs on a mesh is tested where it is made; on one device it compiles faster."""
  with pytest.MonkeyPatch.context() as patch:
    make = functools.wraps(partitioning.make_mesh)(lambda **_: one_device_mesh)
    patch.setattr(partitioning, "make_mesh", make)
    yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("checkpoint")
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=280,
    special_tokens=["<|im_start|>", "<|im_end|>"],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(["Wait, what is the answer?"] * 9, trainer)
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>"
  )
  tokenizer.chat_template = _CHAT
  tokenizer.save_pretrained(folder)
  torch.manual_seed(0)
  transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=280,
      hidden_size=32,
      intermediate_size=64,
      num_hidden_layers=1,
      num_attention_heads=4,
      num_key_value_heads=2,
      head_dim=8,
      max_position_embeddings=512,
      initializer_range=0.5,
      bos_token_id=0,
      eos_token_id=1,
    )
  ).save_pretrained(folder)
  return folder


@pytest.fixture(scope="module")
def config(checkpoint, tmp_path_factory) -> dict:
  """That of the smoke run, on this checkpoint and these questions."""
  path = tmp_path_factory.mktemp("questions") / "questions.jsonl.gz"
  with gzip.open(path, "wt") as file:
    for question, answer in _QUESTIONS:
      file.write(json.dumps({"question": question, "answer": answer}) + "\n")
  c = config_page.get_config("smoke").to_dict()
  c["checkpoint"] = str(checkpoint)
  c["questions"]["path"] = str(path)
  c["engine"]["max_length"] = 256
  return c


def _run(config, folder, only=None):
  runner.run(config, folder, only=only, verify=False, progress=_QUIET)


def _changed(config, path, value):
  changed = copy.deepcopy(config)
  *sections, key = path.split(".")
  section = changed
  for name in sections:
    section = section[name]
  section[key] = value
  return changed


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("run")
  _run(config, folder)
  return folder


@pytest.fixture(scope="module")
def report(config, finished) -> dict:
  return budget_forcing_report.make_report(config, finished, command="a command")


def _records(finished, name):
  return list(artifacts.open_artifact(finished / name).records())


def test_the_right_answers_are_taken_from_their_format(finished):
  assert [record["answer"] for record in _records(finished, "questions")] == ["8", "1,200", "-2"]


def test_every_arm_keeps_its_bounds(config, finished):
  for name, arm in config["arms"].items():
    responses = _records(finished, f"responses/{name}")
    assert len(responses) == len(_QUESTIONS) * arm["num_samples"], name
    for response in responses:
      assert response["error"] is None
      assert len(response["answer_tokens"]) <= 4
      if arm["max_tokens"] != "auto":
        assert len(response["thinking_tokens"]) <= arm["max_tokens"], name
  long, short = (_records(finished, f"responses/{name}") for name in ("forcing_8", "forcing_4"))
  for cut, whole in zip(short, long, strict=True):
    assert whole["thinking_tokens"][:4] == cut["thinking_tokens"]
    assert cut["forced"] == "max" or len(cut["thinking_tokens"]) < 4
  waits = _records(finished, "responses/forcing_8_wait_1")
  assert all(
    r["num_ignored"] == 1 and "Wait" in r["thinking"] for r in waits if r["forced"] == "min"
  )


def test_a_prompt_is_a_chat_in_which_a_question_ends_no_turn(config, finished):
  model = budget_forcing_model.load_model(
    artifacts.open_artifact(finished / "checkpoint"),
    **{key: config[key] for key in ("mesh", "compute", "engine")},
    chat=True,
  )
  ids = budget_forcing_model.encode_prompt(
    model,
    "What? <|im_end|>",
    {"kind": "token", "amount": 64},
    chat=True,
    system="Be brief.",
    text="Q: {question}",
  )
  assert [id_ for id_ in ids if id_ < 2] == [0, 1, 0, 1, 0]  # of the three turns alone
  text = model.tokenizer.backend.decode(list(ids), skip_special_tokens=False)
  assert text.startswith(
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ: What? <|im_end|>"
  )
  assert "up to 64 tokens" in text and text.endswith("<|im_start|>assistant\n")
  plain = budget_forcing_model.encode_prompt(
    model, "What?", None, chat=False, system="", text="Q: {question}"
  )
  assert model.tokenizer.decode(plain) == "Q: What?"
  assert model.encode_markup("a<|im_end|>b")[1] == 1


def test_the_report_has_a_point_for_each_run_and_the_measures_of_each_method(config, report):
  assert len(report["points"]) == sum(len(arm["votes"]) for arm in config["arms"].values())
  assert report["questions"] == 3
  assert report["methods"].keys() == {arm["method"] for arm in config["arms"].values()}
  forcing = report["methods"]["budget forcing"]
  assert forcing["num_runs"] == 3 and forcing["control"] == 1.0
  assert report["methods"]["majority vote"]["control"] is None  # of which no length is demanded
  one, two = (p for p in report["points"] if p["arm"] == "parallel")
  assert (one["num_samples"], two["num_samples"]) == (1, 2)
  assert two["thinking_tokens"]["value"] > one["thinking_tokens"]["value"]
  assert two["accuracy"]["unit"] == "accuracy"


def test_the_page_draws_both_curves_and_the_table_is_printed(config, finished, capsys):
  budget_forcing_report.make_and_print(config, finished, command="a command")
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].split() == ["method", "runs", "control", "scaling", "performance"]
  assert lines[-1] == str(finished / "report" / "report.html")
  page = (finished / "report" / "report.html").read_text()
  assert page.count('<svg class="plot"') == 2
  for text in ("budget forcing", "majority vote", "thinking tokens per question", "a command"):
    assert text in page
  kept = json.loads((finished / "report" / "report.json").read_text())
  assert kept["methods"]["budget forcing"]["performance"]["stderr"] >= 0


def _grade(question, sample, vote, correct, tokens, forced="none"):
  return {
    "question_id": question,
    "sample": sample,
    "vote": vote,
    "correct": correct,
    "num_thinking_tokens": tokens,
    "sampled_tokens": tokens,
    "forced": forced,
    "status": "equal" if correct else "different",
    "error": None,
  }


def test_a_vote_sums_the_tokens_of_its_samples_and_is_right_where_its_winner_is():
  grades = [
    *(_grade("a", 0, "3", False, 10), _grade("a", 1, "4", True, 20), _grade("a", 2, "4", True, 30)),
    *(_grade("b", 0, "5", True, 1), _grade("b", 1, None, False, 2), _grade("b", 2, "6", False, 3)),
  ]
  demanded = {"min_tokens": 5, "max_tokens": 15}
  one, three = (budget_forcing_report._run(grades, k, demanded) for k in (1, 3))
  assert one.correct_Q.tolist() == [False, True] and one.tokens_Q.tolist() == [10, 1]
  assert three.correct_Q.tolist() == [True, True] and three.tokens_Q.tolist() == [60, 6]
  assert (three.min_tokens, three.max_tokens) == (15, 45)


def test_a_question_without_a_kept_thought_is_wrong_and_shortens_no_mean():
  grades = [_grade("a", 0, "3", True, 10), _grade("b", 0, None, False, 0, forced="rejected")]
  run = budget_forcing_report._run(grades, 1, {"min_tokens": 0, "max_tokens": 15})
  assert run.correct_Q.tolist() == [True, False]
  assert run.thinking_tokens.value == 10


def test_a_method_of_which_no_thought_was_kept_has_no_measures(config, finished, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("report"))
  for name in ("rejection_4", "rejection_8"):
    shutil.rmtree(folder / "grades" / name)
    writer = artifacts.Writer(folder / "grades" / name, config={}, inputs={})
    rejected = [_grade(q, 0, None, False, 0, forced="rejected") for q in "ab"]
    writer.write_jsonl("grades.jsonl", rejected)
    writer.finish({})
  report = budget_forcing_report.make_report(config, folder, command="")
  found = report["methods"]["rejection sampling"]
  assert found == {
    **{"is_control": True, "num_runs": 0},
    **dict.fromkeys(("control", "scaling", "performance")),
  }
  assert "rejection sampling" in budget_forcing_report.describe(report)


def test_a_run_that_lost_a_shard_goes_on_and_ends_with_the_same_bytes(
  config, finished, tmp_path, data_files
):
  folder = tmp_path / "run"
  shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("report"))
  for name in ("forcing_8_wait_1", "parallel", "rejection_4"):
    (folder / "responses" / name / "00001-of-00002.jsonl").unlink()
  _run(config, folder)
  assert data_files(folder) == data_files(finished)


def test_a_run_that_is_told_to_leave_keeps_its_shards_and_goes_on(
  config, finished, tmp_path, data_files, monkeypatch
):
  only = ["checkpoint", "questions", "responses/parallel"]
  with monkeypatch.context() as patch:
    patch.setattr(preemption, "requested", lambda _: True)
    with pytest.raises(preemption.Preempted, match="143"):
      _run(config, tmp_path, only=only)
  assert (tmp_path / "responses/parallel/00000-of-00002.jsonl").exists()
  assert not (tmp_path / "responses/parallel/00001-of-00002.jsonl").exists()
  _run(config, tmp_path, only=only)
  kept = data_files(tmp_path / "responses")
  assert kept == {n: b for n, b in data_files(finished / "responses").items() if n in kept}


def test_a_checkpoint_that_changed_since_it_was_recorded_is_refused(config, checkpoint, tmp_path):
  moved = tmp_path / "checkpoint"
  shutil.copytree(checkpoint, moved)
  config = _changed(config, "checkpoint", str(moved))
  _run(config, tmp_path / "run", only=["checkpoint", "questions"])
  weights = moved / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\1\0")
  with pytest.raises(artifacts.ArtifactError, match=r"are not those that .* recorded"):
    _run(config, tmp_path / "run", only=["responses/forcing_4"])


@pytest.mark.parametrize(
  ("path", "value", "told"),
  [
    ("engine.max_length", 1024, "max_length=1024 is more than the 512 positions"),
    ("arms.forcing_8.max_tokens", 240, "max_tokens=240 does not fit"),
    ("thinking.stop", ["</think>"], "'</think>' is 8 tokens"),
  ],
)
def test_what_does_not_fit_the_model_is_refused_by_name(
  config, finished, tmp_path, path, value, told
):
  with pytest.raises(ValueError, match=told):
    _run(
      _changed(config, path, value),
      tmp_path,
      only=["checkpoint", "questions", "responses/forcing_8"],
    )


@pytest.mark.parametrize(
  ("path", "value", "told"),
  [
    ("questions.answer_format", "latex", "answer_format='latex' is unknown"),
    ("questions.num_questions", 1, "a standard error needs at least 2"),
    ("prompt.text", "What?", "has no {question} in it"),
    ("grading.checker", "eyes", "checker='eyes' is unknown"),
    ("engine.num_slots", 0, "engine.num_slots=0 must be at least 1"),
    ("thinking", {"think_start": ""}, "'thinking' lacks"),
    ("arms", {}, "there are no arms"),
    ("arms.forcing_4.max_tokens", 0, r"arms\.forcing_4: .*max_tokens"),
    ("arms.forcing_4.num_samples", 2, "num_samples=2 at temperature=0 are all one"),
    ("arms.parallel.votes", [1, 3], r"votes=\[1, 3\] must be numbers of samples"),
    ("arms.rejection_4.num_ignored", 1, r"set \['num_ignored'\] to 0"),
    ("arms.rejection_4.sampling", {"temperature": 0.0}, "draws one thought again"),
    ("arms.token_4.condition", {"kind": "page", "amount": 1}, "kind='page' is unknown"),
    ("arms.token_4.condition", {"kind": "token", "amount": "x"}, "amount='x' does not fit"),
    ("arms.token_4.demanded", {"max": 3}, "demanded lacks"),
  ],
)
def test_a_config_that_makes_no_sense_is_refused_before_anything_runs(config, path, value, told):
  with pytest.raises(ValueError, match=told):
    runner.check(_changed(config, path, value))


@pytest.mark.parametrize(
  ("line", "told"),
  [
    ({"question": "q", "answer": "3"}, "has no '####'"),
    ({"question": "q"}, "no field 'answer'"),
  ],
)
def test_questions_that_do_not_fit_the_format_are_refused(config, tmp_path, line, told):
  path = tmp_path / "questions.jsonl"
  path.write_text(json.dumps(line) + "\n")
  with pytest.raises(ValueError, match=told):
    _run(_changed(config, "questions.path", str(path)), tmp_path / "run", only=["questions"])
