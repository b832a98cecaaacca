"""Writes a trained model as a Hugging Face folder."""

import pathlib
from typing import Any, Literal

from jax.sharding import Mesh

from selfimprove_jax.models.checkpoints import hf_export
from selfimprove_jax.pipelines.common import models
from selfimprove_jax.pipelines.common.text import open_tokenizer
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime.config import section


@section
class ExportConfig:
  """Configures the export of the tuned model; `dtype` is that of the exported weights."""

  dtype: Literal["float32", "bfloat16", "float16"]


def write_model(
  context: Context,
  config: ExportConfig,
  *,
  mesh: Mesh,
  files: pathlib.Path,
  eos_token_id: int | list[int],
  max_positions: int,
) -> dict[str, Any]:
  """Writes the model of the input `tuned` as the folder `model`; returns the stage's summary.

  Args:
    files: the tokenizer's folder, which is copied with its chat template.
    eos_token_id: the tokens that end a text, for generation_config.json.
  """
  model, params = models.load_model(context.inputs["tuned"], mesh)
  bos_token_id = open_tokenizer(context.inputs["tokenizer"]).bos_id
  if not context.writer.has("model"):
    with context.writer.shard("model") as (folder, counts):
      hf_export.save_pretrained(
        folder,
        params,
        model.c,
        tokenizer=files,
        generation={"bos_token_id": bos_token_id, "eos_token_id": eos_token_id},
        max_positions=max_positions,
        dtype=config.dtype,
      )
      counts["records"] = 1
  return {"num_parameters": model.c.num_parameters, "dtype": config.dtype}
