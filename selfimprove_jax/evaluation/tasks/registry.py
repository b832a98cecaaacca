"""Tasks as SeqIO tasks: `seqio.TaskRegistry` holds their examples, `seqio.Evaluator` their metrics.

A feature is a JSON text; tokens are the language model's business, since different models tokenize
one task differently.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.evaluation.tasks import metrics as metrics_lib
from selfimprove_jax.evaluation.tasks.builtin import Task
from selfimprove_jax.evaluation.tasks.items import Example, Record

_SPLIT = "test"


def _seqio() -> Any:
  """Imports SeqIO, and with it TensorFlow."""
  # A process that imports Triton (which CUDA builds of PyTorch bring, and transformers imports)
  # after TensorFlow 2.20 ends with a segmentation fault.
  with contextlib.suppress(ImportError):
    import triton  # noqa: F401
  import seqio

  return seqio


def register(task: Task, examples: Sequence[Example]) -> str:
  """Adds a task with its examples to `seqio.TaskRegistry`; returns its name there.

  Registering the same task again replaces its examples.
  """
  seqio = _seqio()
  import tensorflow as tf

  name = f"selfimprove_{task.name}_v{task.version}"
  if name in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(name)
  # SeqIO measures the length of features, so a text is a sequence of one.
  texts = [[json.dumps(example.to_json())] for example in examples]

  def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> Any:
    del split, shuffle_files, seed
    return tf.data.Dataset.from_tensor_slices({"inputs": texts, "targets": texts})

  feature = seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.string, rank=1)
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      dataset, splits=[_SPLIT], num_input_examples={_SPLIT: len(texts)}
    ),
    preprocessors=[],
    output_features={"inputs": feature, "targets": feature},
    metric_objs=[_metric(metric) for metric in task.metrics],
  )
  return name


def evaluate(
  task: Task, examples: Sequence[Example], score: Callable[[Sequence[Example]], Sequence[Record]]
) -> dict[str, Estimate]:
  """Runs `seqio.Evaluator` on a task.

  Args:
    score: returns the record of each example; see `evaluation.scoring.run`.
  """
  seqio = _seqio()

  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # it warns that it writes no results; our stages do
  try:
    evaluator = seqio.Evaluator(
      register(task, examples),
      feature_converter=_converter(),
      eval_split=_SPLIT,
      sequence_length={"inputs": None, "targets": None},
      logger_cls=[],
    )
  finally:
    logging.set_verbosity(verbosity)

  def score_fn(dataset: Any) -> list[tuple[int, str]]:
    indices = [int(index) for index, _ in dataset.as_numpy_iterator()]
    records = score([examples[index] for index in indices])
    return [(i, json.dumps(record)) for i, record in zip(indices, records, strict=True)]

  found, _ = evaluator.evaluate(compute_metrics=True, score_fn=score_fn)
  (by_metric,) = found.result().values()
  return {name: value.estimate for name, value in by_metric.items()}


@dataclasses.dataclass
class _Value:
  """A metric's value as `seqio` passes it on."""

  estimate: Estimate


def _metric(name: str) -> Any:
  seqio = _seqio()
  from flax import struct

  @struct.dataclass
  class Metric(seqio.metrics.Metric):
    records: Any = struct.field(pytree_node=False, default=())
    model_output_type: seqio.metrics.ModelOutputType = seqio.metrics.ModelOutputType.SCORE

    @classmethod
    def from_model_output(cls, inputs: Any, model_output: Any, *args: Any, **options: Any) -> Any:
      del inputs, args, options
      return cls(records=[json.loads(str(text)) for text in model_output])

    def compute(self) -> dict[str, Any]:
      value = _value_type()(metrics_lib.estimate(name, self.records))
      return {name: value}

  return Metric


@functools.cache
def _value_type() -> type:
  seqio = _seqio()

  return type("EstimateValue", (_Value, seqio.metrics.MetricValue), {})


def _converter() -> Any:
  seqio = _seqio()

  class Converter(seqio.PassThroughFeatureConverter):
    TASK_FEATURES = {}
    MODEL_FEATURES = {}
    pack = False

  return Converter()
