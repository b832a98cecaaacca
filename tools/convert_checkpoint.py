"""Checkpoints of models, between Hugging Face folders and orbax.

  python tools/convert_checkpoint.py --from=Llama-3.1-8B --to=models/llama-3.1-8b
  python tools/convert_checkpoint.py --from=runs/sbp/arms/sbp --to=export/sbp --dtype=bfloat16

Reads a Hugging Face folder, a .gguf file, a folder of parameters that this tool wrote, or a trained
stage of a run (its best step, or --step). Writes the other kind: parameters in orbax, which restore
on any mesh, from the first two, and a Hugging Face folder from the last two; --format says
otherwise. The tokenizer and generation_config.json go along. The model lies in memory once, in the
dtype written, spread over this machine's devices (JAX_PLATFORMS=cpu keeps it off accelerators).
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
from typing import Any

import jax
from jax.sharding import Mesh

from selfimprove_jax import artifacts, partitioning
from selfimprove_jax.models import gguf, hf, hf_export, params_checkpoint, pretrained
from selfimprove_jax.models.checksums import DamagedCheckpointError
from selfimprove_jax.models.hf_names import hf_tensors
from selfimprove_jax.models.llama import Llama, LlamaConfig
from selfimprove_jax.models.params import abstract_params
from selfimprove_jax.pipelines import model_stages
from selfimprove_jax.training import checkpoint


@dataclasses.dataclass(frozen=True)
class Model:
  """What is converted.

  Attributes:
    max_positions: context length.
    tokenizer: folder of its files; None if there is none.
    generation: content of generation_config.json; None if nothing is known.
  """

  config: LlamaConfig
  params: Any
  max_positions: int
  tokenizer: pathlib.Path | None
  generation: dict[str, Any] | None


def read_stage(folder: pathlib.Path, mesh: Mesh, *, step: int | None, dtype: str | None) -> Model:
  """A trained stage of a run: the parameters that its manifest vouches for, or those of a step.

  Raises:
    artifacts.ArtifactError: the stage is unfinished, trains nothing, or is damaged.
    ValueError: it has no checkpoint of that step.
  """
  artifact = artifacts.open_artifact(folder)
  if not {"model", "step", "checksums"} <= artifact.summary.keys():
    raise artifacts.ArtifactError(f"stage {folder} trained no model")
  if step is None:
    model, params = model_stages.load_model(artifact, mesh)
  else:
    model = Llama(LlamaConfig(**{**artifact.summary["model"], "dropout_rate": 0.0}))
    with checkpoint.Checkpoints(folder / "checkpoints", keep=None) as saved:
      if step not in saved.steps():
        raise ValueError(f"{folder} has no checkpoint of step {step}; it has {saved.steps()}")
      params = saved.restore_params(step, abstract_params(model, mesh))
  config = dataclasses.replace(model.c, param_dtype=dtype or model.c.param_dtype)
  params = jax.tree.map(lambda x: x.astype(config.param_dtype), params)
  stage_config = json.loads((folder / "config.json").read_text())["config"]
  tokenizers = [parent / "tokenizer" for parent in folder.resolve().parents]
  tokenizers = [path for path in tokenizers if (path / "manifest.json").exists()]
  tokenizer = artifacts.open_artifact(tokenizers[0]).path("tokenizer") if tokenizers else None
  return Model(
    config,
    params,
    stage_config["training"]["seq_len"],
    tokenizer,
    None if tokenizer is None else _special_tokens(tokenizer),
  )


def read_pretrained(
  path: pathlib.Path, mesh: Mesh, *, dtype: str | None, scratch: pathlib.Path
) -> Model:
  """A Hugging Face folder, a .gguf file or parameters in orbax, in `dtype` or their own."""
  kind = pretrained.kind(path)
  if dtype is None:
    dtype = (
      hf.read_dtype(path) if kind == "hf" else pretrained.read_config(path, changes={}).param_dtype
    )
  config, params = pretrained.load_pretrained(path, mesh, changes={"param_dtype": dtype})
  tokenizer, generation = None, None
  if kind == "gguf":
    gguf.save_tokenizer(path, scratch)
    tokenizer = scratch
  else:
    try:
      tokenizer = hf.read_tokenizer_path(path)
    except ValueError as error:
      print(f"{error}, by --tokenizer", file=sys.stderr)
    generation_file = path / hf_export.GENERATION_FILE
    if generation_file.exists():
      generation = json.loads(generation_file.read_text())
  if generation is None and tokenizer is not None:
    generation = _special_tokens(tokenizer)
  return Model(config, params, pretrained.read_max_positions(path), tokenizer, generation)


def _special_tokens(tokenizer: pathlib.Path) -> dict[str, int]:
  import transformers

  loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
  names = ("bos_token_id", "eos_token_id", "pad_token_id")
  return {name: getattr(loaded, name) for name in names if getattr(loaded, name) is not None}


def write(model: Model, target: pathlib.Path, *, to_format: str, max_shard_bytes: int) -> None:
  """Writes the model as a Hugging Face folder ("hf") or as parameters in orbax ("orbax")."""
  if to_format == "hf":
    hf_export.save_pretrained(
      target,
      model.params,
      model.config,
      tokenizer=model.tokenizer,
      generation=model.generation,
      max_positions=model.max_positions,
      dtype=model.config.param_dtype,
      max_shard_bytes=max_shard_bytes,
    )
    return
  params_checkpoint.save_params(
    target,
    model.params,
    model.config,
    tokenizer=model.tokenizer,
    max_positions=model.max_positions,
  )
  if model.generation is not None:
    artifacts.write_json(target / hf_export.GENERATION_FILE, model.generation)


def main() -> int:
  description, _, details = __doc__.partition("\n\n")
  parser = argparse.ArgumentParser(
    description=description,
    epilog=details,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--from", dest="source", type=pathlib.Path, required=True)
  parser.add_argument("--to", dest="target", type=pathlib.Path, required=True, help="a new folder")
  parser.add_argument("--format", choices=("hf", "orbax"), help="of --to; the other by default")
  parser.add_argument(
    "--dtype", choices=("float32", "bfloat16", "float16"), help="to store; as it is by default"
  )
  parser.add_argument("--step", type=int, help="of a run's stage; its best by default")
  parser.add_argument(
    "--tokenizer", type=pathlib.Path, help="folder of one to use instead of the model's"
  )
  parser.add_argument(
    "--max_positions", type=int, help="context length to name; the model's by default"
  )
  parser.add_argument("--max_shard_gb", type=float, default=5.0, help="of a safetensors file")
  arguments = parser.parse_args()

  source = arguments.source
  if not source.exists():
    parser.error(f"--from={source} does not exist")
  is_stage = (source / "manifest.json").exists() or (source / "checkpoints").exists()
  if arguments.step is not None and not is_stage:
    parser.error(f"--step={arguments.step} is for a stage of a run, and {source} is none")
  try:
    mesh = partitioning.make_mesh(data=1, fsdp=-1, tensor=1)
    with tempfile.TemporaryDirectory() as scratch:
      if is_stage:
        model = read_stage(source, mesh, step=arguments.step, dtype=arguments.dtype)
      else:
        model = read_pretrained(source, mesh, dtype=arguments.dtype, scratch=pathlib.Path(scratch))
      to_format = arguments.format
      if to_format is None:
        from_hf = not is_stage and pretrained.kind(source) in ("hf", "gguf")
        to_format = "orbax" if from_hf else "hf"
      if arguments.tokenizer is not None:
        model = dataclasses.replace(model, tokenizer=hf.read_tokenizer_path(arguments.tokenizer))
      if arguments.max_positions is not None:
        model = dataclasses.replace(model, max_positions=arguments.max_positions)
      write(
        model,
        arguments.target,
        to_format=to_format,
        max_shard_bytes=round(arguments.max_shard_gb * 1e9),
      )
  except (ValueError, OSError, artifacts.ArtifactError, DamagedCheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  leaves = jax.tree.leaves(model.params)
  num_bytes = sum(leaf.nbytes for leaf in leaves)
  num_tensors = len(hf_tensors(model.config)) if to_format == "hf" else len(leaves)
  print(
    f"wrote {arguments.target} ({to_format}): {num_tensors} tensors of "
    f"{model.config.num_parameters:,} parameters, {num_bytes:,} bytes in "
    f"{model.config.param_dtype}; tokenizer {'written' if model.tokenizer else 'absent'}"
  )
  return 0


if __name__ == "__main__":
  sys.exit(main())
