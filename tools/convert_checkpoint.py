"""Converts checkpoints of models between Hugging Face folders and orbax folders.

  python tools/convert_checkpoint.py --from=Llama-3.1-8B --to=models/llama-3.1-8b
  python tools/convert_checkpoint.py --from=runs/sbp/arms/sbp --to=export/sbp --dtype=bfloat16

Reads a Hugging Face folder, a .gguf file, a folder of parameters that this tool wrote, or a trained
stage of a run (its best step, or --step). By default, the first two become a folder of parameters
in orbax, which restore on any mesh, and the others a Hugging Face folder; --format overrides this.
Copies the tokenizer and generation_config.json. Memory must hold the model once, in the dtype
written, spread over this machine's devices (JAX_PLATFORMS=cpu keeps it off accelerators).
"""

import argparse
import pathlib
import sys
import tempfile

import jax

from selfimprove_jax.models.checkpoints import (
  Checkpoint,
  hf_export,
  open_checkpoint,
  params_checkpoint,
  tokenizer_files,
)
from selfimprove_jax.models.checkpoints.hf_names import hf_tensors
from selfimprove_jax.models.checksums import DamagedCheckpointError
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.runtime.progress import Progress


def convert(
  source: Checkpoint,
  target: pathlib.Path,
  *,
  to_format: str,
  dtype: str | None,
  tokenizer: pathlib.Path | None,
  max_positions: int | None,
  max_shard_bytes: int,
  progress: Progress,
) -> str:
  """Writes a checkpoint as a Hugging Face folder ("hf") or as parameters in orbax ("orbax").

  Args:
    dtype: the dtype to store; None keeps the source's.
    tokenizer: the folder of a tokenizer to use instead of the source's.
    max_positions: the context length to write; None keeps the source's.
    progress: shows the bytes that were read and written.

  Returns:
    A sentence that describes the new checkpoint.
  """
  config = source.compute_config({"param_dtype": dtype or source.dtype})
  max_positions = max_positions or source.max_positions
  mesh = partitioning.make_mesh(data=1, fsdp=-1, tensor=1)
  params = source.load_params(mesh, config, progress=progress)
  with tempfile.TemporaryDirectory() as scratch:
    if tokenizer is None:
      try:
        source.copy_tokenizer(scratch)
        tokenizer = pathlib.Path(scratch)
      except ValueError as error:
        print(f"{error}, with --tokenizer", file=sys.stderr)
    generation = source.generation
    options = {"tokenizer": tokenizer, "max_positions": max_positions}
    if to_format == "hf":
      hf_export.save_pretrained(
        target,
        params,
        config,
        generation=generation,
        dtype=config.param_dtype,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
        **options,
      )
    else:
      progress.note(f"writing {target}")
      params_checkpoint.save_params(target, params, config, **options)
      if generation is not None:
        artifacts.write_json(target / tokenizer_files.GENERATION_FILE, generation)
  leaves = jax.tree.leaves(params)
  num_bytes = sum(leaf.nbytes for leaf in leaves)
  num_tensors = len(hf_tensors(config)) if to_format == "hf" else len(leaves)
  return (
    f"wrote {target} ({to_format}): {num_tensors} tensors of {config.num_parameters:,} parameters, "
    f"{num_bytes:,} bytes in {config.param_dtype}; tokenizer {'written' if tokenizer else 'absent'}"
  )


def main() -> int:
  description, _, details = __doc__.partition("\n\n")
  parser = argparse.ArgumentParser(
    description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--from", dest="source", type=pathlib.Path, required=True)
  parser.add_argument("--to", dest="target", type=pathlib.Path, required=True, help="a new folder")
  parser.add_argument(
    "--format", choices=("hf", "orbax"), help="format of --to; default: the other one than --from"
  )
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16", "float16"),
    help="dtype to store; default: that of --from",
  )
  parser.add_argument("--step", type=int, help="step of a trained stage; default: its best")
  parser.add_argument(
    "--tokenizer", type=pathlib.Path, help="folder of a tokenizer to use instead of the model's"
  )
  parser.add_argument(
    "--max_positions", type=int, help="context length to write; default: the model's"
  )
  parser.add_argument(
    "--max_shard_gb", type=float, default=5.0, help="largest size of a safetensors file"
  )
  arguments = parser.parse_args()
  if not arguments.source.exists():
    parser.error(f"--from={arguments.source} does not exist")
  try:
    source = open_checkpoint(arguments.source, step=arguments.step)
    written = convert(
      source,
      arguments.target,
      to_format=arguments.format or ("orbax" if source.kind in ("hf", "gguf") else "hf"),
      dtype=arguments.dtype,
      tokenizer=arguments.tokenizer,
      max_positions=arguments.max_positions,
      max_shard_bytes=round(arguments.max_shard_gb * 1e9),
      progress=Progress(),
    )
  except (ValueError, OSError, artifacts.ArtifactError, DamagedCheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(written)
  return 0


if __name__ == "__main__":
  sys.exit(main())
