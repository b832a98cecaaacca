"""Two invented documents with questions and recorded texts, a tiny model, and a page."""

import itertools
import json
import pathlib
from typing import Any

import pytest

from configs import entigraph_quick
from selfimprove_jax.pipelines import entigraph
from selfimprove_jax.pipelines.common import endpoints
from selfimprove_jax.runs import runner
from selfimprove_jax.runtime.config import parse, to_json
from selfimprove_jax.runtime.partitioning import MeshConfig
from selfimprove_jax.runtime.progress import Progress
from tests.evaluation import tiny_model
from tests.language_models.conftest import Server

ENTITIES = {"mill": ["the mill", "Ada Orn", "the river Tove"], "moth": ["the moth", "the lamp"]}
_TEXTS = {
  "mill": (
    "The mill stands on the river Tove.\n\nAda Orn built it in 1802, of oak and slate. Its wheel "
    "has twelve buckets.\n\nIn 1840 a flood took the wheel, and Ada Orn's son made one of iron."
  ),
  "moth": (
    "The moth has four wings, and flies to the lamp.\n\n\nThe lamp burns oil of the whale nut. A "
    "moth lives nine days."
  ),
}
_REPEATED = "They are known to each other since the year of the flood."


def _questions(document: str) -> list[dict[str, Any]]:
  asked = {
    "mill": [("Who built it", "Ada Orn", "a miller"), ("How many buckets has it", "twelve", "ten")],
    "moth": [("How long does it live", "nine days", "a year"), ("What burns", "oil", "wood")],
  }
  return [
    {
      "id": f"{document}-{number}",
      "document": document,
      "question": f"{question}?",
      "choices": [wrong, right],
      "answer": 1,
      "short_answers": [right],
    }
    for number, (question, right, wrong) in enumerate(asked[document])
  ]


def _recorded(document: str) -> dict[str, list[dict[str, Any]]]:
  """Recorded texts; the first text about a pair is the same for both documents."""
  entities = ENTITIES[document]
  summary = f"A short account of {entities[0]}."
  related = [
    *(("pair", key) for key in itertools.combinations(entities, 2)),
    *(("triplet", key) for key in itertools.combinations(entities, 3)),
  ]
  texts = [
    _REPEATED if not number else f"{' and '.join(key)} belong together, for the {number}th reason."
    for number, (_, key) in enumerate(related)
  ]
  entigraph = [
    {"document": document, "step": "entities", "summary": summary, "entities": entities},
    *(
      {"document": document, "step": step, "entities": list(key), "text": text}
      for (step, key), text in zip(related, texts)
    ),
  ]
  rephrase = [
    {
      "document": document,
      "style": style,
      "sample": sample,
      "text": f"In {style} words, {sample}: {_TEXTS[document]}",
    }
    for sample, style in itertools.product(range(2), ("easy", "hard"))
  ]
  return {"entigraph": entigraph, "rephrase": rephrase}


def _write(path: pathlib.Path, records: list[dict[str, Any]]) -> None:
  path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="session")
def niche(tmp_path_factory) -> pathlib.Path:
  """A folder of source documents with their questions and recorded texts."""
  root = tmp_path_factory.mktemp("niche")
  for document, text in _TEXTS.items():
    folder = root / document
    folder.mkdir()
    title = f"The {document}"
    _write(folder / "document.jsonl", [{"id": document, "title": title, "text": text}])
    _write(folder / "questions.jsonl", _questions(document))
    for name, records in _recorded(document).items():
      _write(folder / f"{name}.jsonl", records)
  return root


@pytest.fixture(scope="session")
def replay(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("replay") / "replay.jsonl"
  colors, things = ("red", "green", "blue", "gray"), ("kite", "boat", "drum", "coat", "gate")
  records = [
    {"text": f"A {color} {thing} is seen on day {day} of the {thing} fair.", "page": thing}
    for day, (color, thing) in enumerate(itertools.product(colors, things))
  ]
  _write(path, records)
  return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> pathlib.Path:
  return tiny_model.save(tmp_path_factory.mktemp("checkpoint"), adds_bos=True)


@pytest.fixture(scope="session")
def values(niche, replay, checkpoint) -> dict[str, Any]:
  """The page of the smoke run as JSON values, on these files."""
  c = json.loads(json.dumps(entigraph_quick.get_config("smoke").to_dict()))
  c["seq_len"] = 64
  c["sources"]["documents"] |= {"folder": str(niche), "documents": []}
  c["generator"]["folder"] = str(niche)
  c["synthesis"] |= {"rephrase_styles": ["easy", "hard"], "rephrase_samples": 2}
  c["synthesis"]["relations"]["max_texts_per_document"] = None
  c["corpora"]["max_piece_chars"] = 100
  special = dict(bos_token=tiny_model.BOS, eos_token=tiny_model.EOS)
  special |= dict(sep_token=tiny_model.EOS, pad_token=tiny_model.EOS)
  c["initial"] = {"path": str(checkpoint), "special_tokens": special}
  c["replay"]["source"] = {"kind": "jsonl", "paths": [str(replay)], "id_field": None}
  c["replay"]["source"]["group_field"] = "page"
  c["replay"]["split"] |= {"test_fraction": 0.4, "min_passage_chars": 1}
  c["replay_tokens"] = 600
  arm = dict(target_tokens=900, replay_share=0.25)
  c["arms"] = {
    "raw": arm | {"corpora": {"raw": 1.0}},
    "entigraph": arm | {"corpora": {"entigraph": 1.0}, "curve": "entigraph"},
    "half": arm | {"corpora": {"entigraph": 1.0}, "corpus_share": 0.5, "curve": "entigraph"},
    "stopped": arm | {"corpora": {"raw": 1.0}, "early_stopping": "rephrase"},
  }
  c["model"] = dict(
    vocab_size=300,
    num_layers=1,
    embed_dim=32,
    mlp_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qk_norm=False,
    rope_theta=10_000.0,
    dtype="float32",
  )
  c["training"] |= {
    "batch_rows": 2,
    "peak_lr": 0.1,
    "final_lr": 0.1,
    "num_evaluations": 4,
    "num_checkpoints": 2,
  }
  c["questions"]["engine"] |= {"num_slots": 4, "max_length": 512}
  c["open_book"]["rag"]["max_chars"] = 60
  c["open_book"]["rag"]["embedding"]["dim"] = 2
  c["open_book"] |= {"num_passages": 1, "num_candidates": 2}
  return c


@pytest.fixture(scope="session")
def changed(values):
  """Returns a copy of the page in which `a__b=1` sets a.b, and a None removes the key."""

  def change(**changes: Any) -> dict[str, Any]:
    page = json.loads(json.dumps(values))
    for path, value in changes.items():
      *sections, key = path.split("__")
      section = page
      for name in sections:
        section = section[name]
      section[key] = value
    return page

  return change


@pytest.fixture(scope="session")
def run(one_device_mesh):
  """Runs a page's stages in a folder, on one device; returns the config."""

  def run(page: dict[str, Any], folder: pathlib.Path, only=None, **options) -> entigraph.Config:
    config = parse(entigraph.Config, page)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(MeshConfig, "make", lambda self, devices=None: one_device_mesh)
      options = {"progress": Progress(quiet=True), "config": to_json(config)} | options
      runner.run(entigraph.stages(config), folder, only=only, **options)
    return config

  return run


@pytest.fixture(scope="session")
def finished(values, run, tmp_path_factory) -> pathlib.Path:
  """The folder of a finished run; nobody may write in it."""
  folder = tmp_path_factory.mktemp("run")
  run(values, folder)
  return folder


@pytest.fixture
def closed_models(monkeypatch):
  """Closes the endpoints that a test opened; yields a function that forgets them."""
  models, connect = [], endpoints.connect
  monkeypatch.setattr(
    endpoints, "connect", lambda *arguments: models.append(connect(*arguments)) or models[-1]
  )
  yield connect.cache_clear
  connect.cache_clear()
  for model in set(models):
    model.close()
    model.store.close()


@pytest.fixture
def server(closed_models):
  """An endpoint whose replies a test sets; see writer.py."""
  server = Server()
  yield server
  server.close()
