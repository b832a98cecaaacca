"""Instruction tuning of a checkpoint that transformers made, to one that transformers reads."""

import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from configs import sft
from selfimprove_jax.data import rows
from selfimprove_jax.language_models import TextRequest, local
from selfimprove_jax.models.checkpoints.tokenizer_files import read_tokenizer
from selfimprove_jax.pipelines import instruction_tuning
from selfimprove_jax.pipelines.common.initial import open_chat
from selfimprove_jax.report import page, to_terminal
from selfimprove_jax.runs import artifacts, runner
from selfimprove_jax.runs.stage import Run
from selfimprove_jax.runtime.config import parse, to_json
from selfimprove_jax.runtime.partitioning import MeshConfig
from selfimprove_jax.runtime.progress import Progress

_QUIET = Progress(quiet=True)
_SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|eos|>"}
_ADDED = ["<|im_start|>", "<|im_end|>"]
# `generation` marks for transformers what the assistant wrote; ours must find the same alone.
_TEMPLATE = (
  "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
  "{% if message.role == 'assistant' %}"
  "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
  "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Renders the last answer in another way than earlier ones, as templates that drop thoughts do.
_FORGETFUL = _TEMPLATE.replace(
  "message.content + '<|im_end|>' }}{% endgeneration",
  "('' if loop.last else 'old ') + message.content + '<|im_end|>' }}{% endgeneration",
)
_COLORS = {"sea": "blue", "sun": "gold", "moss": "green", "coal": "black"}


def _turn(thing: str) -> list[dict[str, str]]:
  return [
    {"role": "user", "content": f"color of {thing}?"},
    {"role": "assistant", "content": f"it is {_COLORS[thing]}"},
  ]


def _conversations() -> list[dict[str, Any]]:
  """A greeting that makes each conversation its own, and one or two questions."""
  rng = np.random.default_rng(0)
  made = []
  for number in range(60):
    things = rng.choice(list(_COLORS), int(rng.integers(1, 3)), replace=False)
    system = {"role": "system", "content": f"n {number}"}
    messages = [message for thing in things for message in _turn(str(thing))]
    messages[0]["content"] += f" {number}"
    made.append({"id": f"c{number}", "messages": [system, *messages]})
  return made


def _write(path: pathlib.Path, records: list[Any]) -> str:
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return str(path)


@pytest.fixture(scope="module", autouse=True)
def on_one_device(one_device_mesh):
  """A mesh of one device, which compiles faster; meshes are tested with training and sampling."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(MeshConfig, "make", lambda self, devices=None: one_device_mesh)
    yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
  """A Llama of random weights, without a chat template."""
  folder = tmp_path_factory.mktemp("checkpoint")
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=320,
    special_tokens=[*dict.fromkeys(_SPECIAL.values()), *_ADDED],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  words = " ".join([*_COLORS, *_COLORS.values()])
  backend.train_from_iterator([f"system user assistant color of it is {words}"] * 9, trainer)
  transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **_SPECIAL).save_pretrained(folder)
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
  )
  transformers.LlamaForCausalLM(config).save_pretrained(folder)
  return folder


@pytest.fixture(scope="module")
def values(checkpoint, tmp_path_factory) -> dict[str, Any]:
  """The page of the smoke run, on these conversations and this checkpoint."""
  folder = tmp_path_factory.mktemp("data")
  (folder / "template.jinja").write_text(_TEMPLATE)
  c = json.loads(json.dumps(sft.get_config("smoke").to_dict()))
  c["initial"]["path"] = str(checkpoint)
  c["tuning"]["epochs"] = 16.0
  c["initial"]["chat_template"] = str(folder / "template.jinja")
  c["initial"]["special_tokens"] = {"sep_token": "<|eos|>"}
  c["conversations"]["source"]["id_field"] = "id"
  c["conversations"]["source"]["paths"] = [_write(folder / "chats.jsonl", _conversations())]
  return c


def _run(values: dict[str, Any], folder: pathlib.Path, only: list[str] | None = None) -> Any:
  config = parse(instruction_tuning.Config, values)
  made = instruction_tuning.stages(config)
  runner.run(made, folder, only=only, progress=_QUIET, config=to_json(config))
  return config


def _on(values, tmp_path, records, *, template=None, **conversations) -> dict[str, Any]:
  """The page on other conversations, which are all for training."""
  c = json.loads(json.dumps(values))
  c["conversations"]["source"]["paths"] = [_write(tmp_path / "chats.jsonl", records)]
  c["conversations"] |= {"validation_fraction": 0.0, "test_fraction": 0.0, **conversations}
  if template is not None:
    (tmp_path / "template.jinja").write_text(template)
    c["initial"]["chat_template"] = str(tmp_path / "template.jinja")
  return c


_REJECTED = "_rejected.jsonl"
_TO_ROWS = ["initial", "tokenizer", "conversations", "rows"]


@pytest.fixture(scope="module")
def finished(values, tmp_path_factory) -> Run:
  folder = tmp_path_factory.mktemp("run")
  return Run(folder, _run(values, folder), "a command")


def _segments(folder: pathlib.Path, seq_len: int = 64) -> list[tuple[list[int], list[bool]]]:
  """Tokens and loss mask of every training segment."""
  found = []
  for row in list(rows.open_rows(artifacts.open_artifact(folder), seq_len=seq_len, prefix="train")):
    for number in range(1, row["segment_ids"].max() + 1):
      where = row["segment_ids"] == number
      assert row["positions"][where].tolist() == list(range(where.sum()))
      found.append((row["tokens"][where].tolist(), row["loss_mask"][where].tolist()))
  return found


def test_the_loss_is_on_the_tokens_that_transformers_marks_as_the_assistants(finished):
  peer = transformers.AutoTokenizer.from_pretrained(finished.folder / "export" / "model")
  expected = []
  for record in _conversations():
    found = peer.apply_chat_template(
      record["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    expected.append((found["input_ids"], [bool(m) for m in found["assistant_masks"]]))
  segments = _segments(finished.folder / "rows")
  held_out = artifacts.open_artifact(finished.folder / "conversations").summary["used"]
  assert len(segments) == held_out["train"] == 60 - held_out["test"] - held_out["validation"]
  assert all(segment in expected for segment in segments)
  # Only answers and their ends are learned.
  for tokens, mask in segments:
    learned = peer.decode([t for t, m in zip(tokens, mask) if m])
    assert re.fullmatch(r"(it is (blue|gold|green|black)<\|im_end\|>)+", learned)


def test_held_out_answers_are_learned_and_measured(finished):
  made = instruction_tuning.report(finished)
  found = made.data["heldout"]
  assert found["before"]["value"] == pytest.approx(np.log(320), abs=0.3)
  assert found["after"]["value"] < 1.0
  assert found["documents"] == made.data["conversations"]["used"]["test"] > 5
  targets = artifacts.open_artifact(finished.folder / "rows").summary["test"]["targets"]
  assert found["tokens"] == targets
  assert made.lead.startswith("The held-out loss on answers fell from")
  assert "exported model" in to_terminal(made)
  assert "Loss of instruction tuning" in page.render(made)


def test_the_exported_model_answers_by_its_chat_template(finished, one_device_mesh):
  folder = finished.folder / "export" / "model"
  model = local.load(folder, one_device_mesh, num_slots=4)
  prompts = [[{"role": "system", "content": "n 70"}, _turn(thing)[0]] for thing in _COLORS]
  requests = [TextRequest(prompt=p, max_tokens=12, temperature=0.0) for p in prompts]
  replies = list(model.generate(requests))
  model.close()
  assert [reply.finish_reason for reply in replies] == ["stop"] * 4
  for reply in replies:
    assert re.fullmatch(r"it is (blue|gold|green|black)", reply.text)
  peer = transformers.AutoModelForCausalLM.from_pretrained(folder)
  assert set(_ids(folder, "<|eos|>", "<|im_end|>")) <= set(peer.generation_config.eos_token_id)
  # A trained stage has the template too.
  assert read_tokenizer(
    artifacts.open_artifact(finished.folder / "tokenizer").path("tokenizer"), begins_with_bos=False
  ).chat_template


def test_a_trained_stage_can_be_trained_on_with_its_template(values, finished, tmp_path):
  c = json.loads(json.dumps(values))
  c["initial"] = {"path": str(finished.folder / "tuned"), "chat_template": None}
  _run(c, tmp_path, _TO_ROWS)
  assert artifacts.open_artifact(tmp_path / "initial").summary["max_positions"] == 256
  one, other = (artifacts.open_artifact(f / "tokenizer") for f in (tmp_path, finished.folder))
  assert one.summary["stop_ids"] == other.summary["stop_ids"]
  assert _segments(tmp_path / "rows") == _segments(finished.folder / "rows")


def _ids(folder: pathlib.Path, *tokens: str) -> list[int]:
  return [read_tokenizer(folder, begins_with_bos=False).backend.token_to_id(t) for t in tokens]


def test_equal_openings_are_on_one_side_of_the_split_and_copies_are_dropped(values, tmp_path):
  turns = [f"question {number}" for number in range(40)]
  records = [
    {"id": f"{copy}-{turn}", "messages": [*_said(turn, f"answer {copy}")]}
    for turn in turns
    for copy in (0, 1, 1)
  ]
  records = [{**record, "id": str(number)} for number, record in enumerate(records)]
  c = _on(values, tmp_path, records, test_fraction=0.3, validation_fraction=0.2)
  _run(c, tmp_path / "run", _TO_ROWS[2:3])
  artifact = artifacts.open_artifact(tmp_path / "run" / "conversations")
  assert artifact.summary["repeated"] == 40
  sides: dict[str, set[str]] = {}
  for record in artifact.records():
    sides.setdefault(record["messages"][0]["content"], set()).add(record["split"])
  assert all(len(side) == 1 for side in sides.values())
  assert set.union(*sides.values()) == {"train", "validation", "test"}


def _said(*contents: str) -> list[dict[str, str]]:
  roles = ("user", "assistant")
  return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_long_conversations_are_cut_after_an_answer_or_dropped(values, tmp_path, too_long):
  records = [
    {"id": "short", "messages": _said("a", "b")},
    {"id": "long", "messages": _said("a", "c", "e" * 50, "f" * 50)},
    {"id": "too long", "messages": _said("g" * 100, "h")},
  ]
  c = _on(values, tmp_path, records)
  c["rows"]["too_long"] = too_long
  _run(c, tmp_path / "run", _TO_ROWS)
  summary = artifacts.open_artifact(tmp_path / "run" / "rows").summary
  expected = {"cut": 1, "dropped": 1} if too_long == "cut" else {"cut": 0, "dropped": 2}
  assert {key: summary[key] for key in expected} == expected
  backend = open_chat(artifacts.open_artifact(tmp_path / "run" / "tokenizer")).tokenizer.backend
  texts = {
    backend.decode(t, skip_special_tokens=False) for t, _ in _segments(tmp_path / "run" / "rows")
  }
  start, end = "<|im_start|>", "<|im_end|>"
  ends = [f"\n{start}assistant\nc{end}"] if too_long == "cut" else []
  assert sorted(text.split(end, 1)[1] for text in texts) == [
    f"\n{start}assistant\nb{end}\n",
    *ends,
  ]


def test_traces_are_tokenized_as_budget_forcing_prompts_them(values, tmp_path):
  record = {"question": "why?", "thinking": " it is <|im_end|>\n", "answer": "blue "}
  c = _on(values, tmp_path, [record])
  c["conversations"]["source"] = {
    "kind": "traces",
    "paths": c["conversations"]["source"]["paths"],
    "thinking": {"think_start": "<|im_start|>think", "think_end": "<|im_start|>answer"},
  }
  c["seq_len"] = 100
  _run(c, tmp_path / "run", _TO_ROWS)
  ((tokens, mask),) = _segments(tmp_path / "run" / "rows", 100)
  chat = open_chat(artifacts.open_artifact(tmp_path / "run" / "tokenizer"))
  start, end = (chat.tokenizer.backend.token_to_id(token) for token in _ADDED)
  prompt = chat.render([{"role": "user", "content": "why?"}])
  assert tokens[: len(prompt)] == prompt
  assert not any(mask[: len(prompt)])
  assert all(mask[len(prompt) :])
  encode = chat.tokenizer.encode
  assert tokens[len(prompt) :] == [
    *(start, *encode("think"), *encode("\nit is <|im_end|>\n")),  # spelled by the thought: no token
    *(start, *encode("answer"), *encode("\nblue"), end),
  ]


def test_a_template_that_changes_earlier_answers_is_refused_by_message(values, tmp_path):
  records = [
    {"id": "one", "messages": _said("a", "b")},
    {"id": "two", "messages": _said("a", "b", "c", "d")},
  ]
  c = _on(values, tmp_path, records, template=_FORGETFUL)
  with pytest.raises(ValueError, match=r"conversation 'two'.*messages\[1\] differently"):
    _run(c, tmp_path / "run", _TO_ROWS)
  c["conversations"]["on_error"] = "skip"
  _run(c, tmp_path / "skipping", _TO_ROWS)
  rejected = list(artifacts.open_artifact(tmp_path / "skipping" / "rows").read_jsonl(_REJECTED))
  assert len(rejected) == 1
  assert len(_segments(tmp_path / "skipping" / "rows")) == 1


@pytest.mark.parametrize(
  ("messages", "told"),
  [
    ("hi", "no list 'messages' of messages"),
    ([{"role": "user", "content": "a"}], "no message of the assistant"),
    (_said("a", " "), r"messages\[1\], of the assistant, is empty"),
    ([{"role": "bot", "content": "a"}], r"messages\[0\] has role 'bot'; supported are system"),
    ([{"role": "user", "content": 1.5}], r"messages\[0\]: field 'content' is float, not text"),
    (_said("a", "b")[1:], r"messages\[0\] is the assistant's"),
  ],
)
def test_a_bad_conversation_is_named_by_line_and_id(values, tmp_path, messages, told):
  records = [{"id": "good", "messages": _said("a", "b")}, {"id": "bad", "messages": messages}]
  c = _on(values, tmp_path, records)
  with pytest.raises(ValueError, match=r"chats\.jsonl, line 2 \(id 'bad'\): " + told):
    _run(c, tmp_path / "run", ["conversations"])
  c["conversations"]["on_error"] = "skip"
  _run(c, tmp_path / "skipping", ["conversations"])
  artifact = artifacts.open_artifact(tmp_path / "skipping" / "conversations")
  assert artifact.summary["rejected"] == 1
  assert re.search(told, next(artifact.read_jsonl(_REJECTED))["message"])


def test_other_refusals(values, tmp_path):
  c = _on(values, tmp_path, [{"id": "a", "messages": _said("a", "b" * 200)}])
  with pytest.raises(ValueError, match=r"fits into seq_len=64 tokens .1 are longer"):
    _run(c, tmp_path / "long", _TO_ROWS)
  c = _on(values, tmp_path, [{"id": "a", "messages": _said("a", "b")}], test_fraction=0.01)
  with pytest.raises(ValueError, match="none is for test"):
    _run(c, tmp_path / "few", ["conversations"])
  c = _on(values, tmp_path, [{"id": "a", "messages": _said("a", "b")}] * 2)
  with pytest.raises(ValueError, match="two conversations have the id 'a'"):
    _run(c, tmp_path / "ids", ["conversations"])
  c["initial"]["chat_template"] = None
  with pytest.raises(ValueError, match=r"has no chat template: set initial.chat_template"):
    _run(c, tmp_path / "template", ["initial", "tokenizer"])
