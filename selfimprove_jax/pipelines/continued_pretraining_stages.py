"""Stages of continued pretraining: the checkpoint to begin with, rows, tuning, export."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from selfimprove_jax import artifacts, partitioning
from selfimprove_jax.data import mixture as mixtures
from selfimprove_jax.data import packing
from selfimprove_jax.data import rows as rows_lib
from selfimprove_jax.data import tokenizer as tokenizers
from selfimprove_jax.evaluation import perplexity
from selfimprove_jax.models import hf, hf_export, pretrained
from selfimprove_jax.models.llama import Llama, LlamaConfig
from selfimprove_jax.pipelines import model_stages, text_stages
from selfimprove_jax.pipelines.continued_pretraining import CORPORA
from selfimprove_jax.pipelines.stages import Context

_TAIL_BYTES = 1 << 20


def checkpoint(context: Context, *, path: str, model: dict[str, Any]) -> dict[str, Any]:
  """Records a Hugging Face checkpoint, whose weights stay where they are.

  Args:
    path: its folder.
    model: `LlamaConfig` that was planned with; its shape must be the checkpoint's.

  Raises:
    ValueError: there is no such folder, its weights can't be read, or its model has another shape;
      every difference is named.
  """
  _check_is_folder(path)
  planned = LlamaConfig(**model)
  pretrained.read_config(path, changes=dataclasses.asdict(planned))
  dtype = hf.read_dtype(path)
  files = _file_digests(path)
  context.writer.write_json("files.json", files)
  return {
    "path": path,
    "model": dataclasses.asdict(planned),
    "num_parameters": planned.num_parameters,
    "dtype": dtype,
    "max_positions": pretrained.read_max_positions(path),
    "files_digest": artifacts.digest(files),
  }


def _check_is_folder(path):
  if not pathlib.Path(path).is_dir():
    raise ValueError(
      f"initial.path={path!r} is no folder; give that of a Hugging Face checkpoint "
      f"(config.json, *.safetensors and the tokenizer's files)"
    )


def _file_digests(path: str) -> dict[str, dict[str, Any]]:
  """Size and SHA-256 of a checkpoint's files; of weights only of the header and the last MiB."""
  files = {}
  for file in sorted(pathlib.Path(path).iterdir()):
    if file.suffix == ".safetensors":
      files[file.name] = {"bytes": file.stat().st_size, "sha256_of_ends": _sha256_of_ends(file)}
    elif file.suffix in (".json", ".txt", ".model"):
      digest = hashlib.sha256(file.read_bytes()).hexdigest()
      files[file.name] = {"bytes": file.stat().st_size, "sha256": digest}
  return files


def _sha256_of_ends(file: pathlib.Path) -> str:
  with file.open("rb") as opened:
    length = opened.read(8)
    digest = hashlib.sha256(length + opened.read(int.from_bytes(length, "little")))
    opened.seek(max(opened.tell(), file.stat().st_size - _TAIL_BYTES))
    digest.update(opened.read())
  return digest.hexdigest()


def checkpoint_tokenizer(context: Context, *, special_tokens: dict[str, str]) -> dict[str, Any]:
  """Takes over the tokenizer of the checkpoint; its files as they are go to `original`.

  Args:
    special_tokens: `bos_token` and so on, of `load_tokenizer`; each one the tokenizer has.

  Raises:
    ValueError: the checkpoint has no tokenizer, or one with more ids than the model.
  """
  initial = context.inputs["initial"].summary
  source = pretrained.tokenizer_path(initial["path"])
  tokenizer = tokenizers.load_tokenizer(source, **special_tokens)
  if tokenizer.vocab_size > initial["model"]["vocab_size"]:
    raise ValueError(
      f"the tokenizer of {source} has {tokenizer.vocab_size} ids with the special tokens "
      f"{special_tokens}, its model {initial['model']['vocab_size']}; name by "
      f"initial.special_tokens only tokens that the tokenizer has, so that none is added"
    )
  for name in ("tokenizer", "original"):
    if not context.writer.has(name):
      with context.writer.shard(name) as (folder, counts):
        if name == "tokenizer":
          tokenizer.save(folder)
        else:
          folder.mkdir()
          hf.copy_tokenizer(source, folder)
        counts["records"] = tokenizer.vocab_size
  ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("bos", "eos")}
  return {"vocab_size": tokenizer.vocab_size, "trained": False, **ids}


def rows(
  context: Context, *, seq_len: int, max_tokens: int, batch_documents: int
) -> dict[str, Any]:
  """Packs one corpus: `unique.array_record` to train on, and `validation...` and `test...`.

  Each document is BOS text EOS. Differs from the paper: rows hold whole documents where they fit
  and none sees another; there, blocks are cut from one long concatenation, without a mask.

  Args:
    max_tokens: the first training documents up to this many, or all there are. Their order is
      random, so that less is a random part of more (the scaling curves of the paper).
    batch_documents: tokenized at a time.
  """
  tokenizer = text_stages.open_tokenizer(context.inputs["tokenizer"])
  documents = context.inputs["documents"]
  parts = {
    "unique": ("train", max_tokens),
    "validation": ("validation", float("inf")),
    "test": ("test", float("inf")),
  }
  with context.progress.track(None, label=context.name, unit="tokens") as bar:

    def examples(role: str, budget: float | int) -> Iterator[packing.Example]:
      for _, ids in text_stages.encoded_records(
        documents, role, tokenizer, budget, batch_documents=batch_documents
      ):
        bar.update(len(ids))
        yield packing.document_example(ids, tokenizer)

    return {
      part: text_stages.write_packed(
        context, part, examples(role, budget), seq_len, tokenizer.pad_id
      )
      for part, (role, budget) in parts.items()
    }


def tune(
  context: Context,
  *,
  kind: str,
  model: dict[str, Any],
  mesh: dict[str, int],
  training: dict[str, Any],
  epochs: float,
  replay_share: float,
  weight_decay: float,
  dropout_rate: float,
  evaluation: dict[str, Any],
  seed: int,
) -> dict[str, Any]:
  """Trains all parameters on new text and replay; scores held-out documents before and after.

  Writes `before-new_text.jsonl`, `after-replay.jsonl` and so on: the loss of each test document.
  The losses between steps are of the validation rows of the new text.

  Args:
    kind: what the input `initial` is: "checkpoint" or "pretrain".
    training: see `model_stages.train`.
    epochs: rows trained on, over the rows of new text. Replay rows count: they take the place of
      new text, as in the paper, so that `(1 - replay_share) * epochs` passes over it are made.
    replay_share: of all rows, exact and evenly spread, drawn without replacement; the paper tosses
      a coin for each row, and draws with replacement.

  Raises:
    artifacts.ArtifactError: the checkpoint's files are not those that were recorded.
  """
  placed = partitioning.make_mesh(**mesh)
  initial_model, params = _initial(context.inputs["initial"], kind, model, placed)
  network = dataclasses.replace(initial_model, dropout_rate=dropout_rate)
  seq_len = training["seq_len"]

  def open_rows(name: str, part: str) -> rows_lib.RowSource:
    return rows_lib.open_rows(context.inputs[name], seq_len=seq_len, prefix=f"{part}.")

  scorers = {
    name: perplexity.RowScorer(
      Llama(network), placed, open_rows(name, "test"), batch_size=evaluation["batch_rows"]
    )
    for name in CORPORA
  }
  tokenizer = text_stages.open_tokenizer(context.inputs["tokenizer"])

  def score(when: str, params: Any) -> None:
    for name, scorer in scorers.items():
      shard = f"{when}-{name}.jsonl"
      if not context.writer.has(shard):
        found = scorer.documents(params, tokenizer)
        context.writer.write_jsonl(shard, _loss_records(found))

  score("before", params)
  new_text = open_rows("new_text", "unique")
  components = [mixtures.Component("new_text", new_text, 1 - replay_share, repeat=True)]
  if replay_share:
    replay = open_rows("replay", "unique")
    components.append(mixtures.Component("replay", replay, replay_share, repeat=True))
  summary, params = model_stages.train(
    context,
    model=network,
    mesh=placed,
    training=training,
    num_steps=max(1, round(epochs * len(new_text) / training["batch_rows"])),
    components=components,
    validation=open_rows("new_text", "validation"),
    weight_decay=weight_decay,
    evaluation=evaluation,
    seed=seed,
    initial_params=params,
  )
  score("after", params)
  return summary


def _initial(
  artifact: artifacts.Artifact, kind: str, model: dict[str, Any], mesh: Mesh
) -> tuple[LlamaConfig, Any]:
  """The model to begin with, computed as the config says, and its parameters on the mesh."""
  if kind == "checkpoint":
    path = artifact.summary["path"]
    if artifacts.digest(_file_digests(path)) != artifact.summary["files_digest"]:
      raise artifacts.ArtifactError(
        f"the files of the checkpoint {path} are not those that {artifact.folder} recorded; put "
        f"them back, or begin in another workdir"
      )
    return pretrained.load_pretrained(path, mesh, changes=dataclasses.asdict(LlamaConfig(**model)))
  found, params = model_stages.load_model(artifact, mesh)
  return found.c, params


def _loss_records(found: perplexity.DocumentLosses) -> Iterator[dict[str, Any]]:
  for nll, num_tokens, num_bytes in zip(
    found.nll_sums.tolist(), found.token_counts.tolist(), found.byte_counts.tolist()
  ):
    yield {"nll": nll, "tokens": num_tokens, "bytes": num_bytes}


def export(
  context: Context, *, kind: str, mesh: dict[str, int], dtype: str, seq_len: int
) -> dict[str, Any]:
  """Writes the tuned model and its tokenizer as the Hugging Face folder `model`.

  Args:
    kind: of the input `initial`.
    dtype: of the weights there.
    seq_len: the context that the model is said to have, where no checkpoint says it.
  """
  model, params = model_stages.load_model(context.inputs["tuned"], partitioning.make_mesh(**mesh))
  artifact = context.inputs["tokenizer"]
  tokenizer = text_stages.open_tokenizer(artifact)
  if kind == "checkpoint":
    files = artifact.path("original")
    max_positions = context.inputs["initial"].summary["max_positions"]
  else:
    files, max_positions = artifact.path("tokenizer"), seq_len
  if not context.writer.has("model"):
    with context.writer.shard("model") as (folder, counts):
      hf_export.save_pretrained(
        folder,
        params,
        model.c,
        tokenizer=files,
        generation={"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id},
        max_positions=max_positions,
        dtype=dtype,
      )
      counts["records"] = 1
  return {"num_parameters": model.c.num_parameters, "dtype": dtype}
