"""Every package that the project depends on imports and works, next to all the others."""

import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

# Requirement -> a program that imports the package and uses it once, in the folder `tmp`.
_USES = {
  "absl-py": "from absl import flags; assert flags.FlagValues()(['x']) == ['x']",
  "accelerate": "import accelerate; assert accelerate.utils.is_torch_version('>=', '2')",
  "array-record": """
from array_record.python import array_record_module as records
writer = records.ArrayRecordWriter(f'{tmp}/x', 'group_size:1')
writer.write(b'a'); writer.close()
assert records.ArrayRecordReader(f'{tmp}/x').read_all() == [b'a']""",
  "beartype": """
import beartype
@beartype.beartype
def f(x: int): pass
try: f('a')
except beartype.roar.BeartypeCallHintParamViolation: pass
else: raise AssertionError""",
  "datasets": "import datasets; assert datasets.Dataset.from_dict({'x': [1]})[0] == {'x': 1}",
  "etils": "from etils import epath; assert str(epath.Path('gs://a') / 'b') == 'gs://a/b'",
  "fastapi": """
import fastapi
app = fastapi.FastAPI(); app.get('/x')(lambda: 1)
assert '/x' in app.openapi()['paths']""",
  "filelock": "import filelock\nwith filelock.FileLock(f'{tmp}/lock'): pass",
  "flax": """
from flax import nnx
assert nnx.Linear(2, 3, rngs=nnx.Rngs(0))(jax.numpy.ones((1, 2))).shape == (1, 3)""",
  "gcp-storage-emulator": "from gcp_storage_emulator.server import create_server",
  "gcsfs": "import gcsfs; assert gcsfs.GCSFileSystem(token='anon').protocol",
  "gguf": """
import gguf
writer = gguf.GGUFWriter(f'{tmp}/x.gguf', 'llama')
writer.add_tensor('x', numpy.ones(3, 'float32'))
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file()
writer.close()
assert gguf.GGUFReader(f'{tmp}/x.gguf').tensors[0].name == 'x'""",
  "grain": """
import grain
assert list(grain.MapDataset.range(3).map(lambda x: 2 * x)) == [0, 2, 4]""",
  "h11": "import h11; assert h11.Connection(h11.SERVER).their_state is h11.IDLE",
  "httpx": """
import httpx
transport = httpx.MockTransport(lambda request: httpx.Response(204))
assert httpx.Client(transport=transport).get('http://x').status_code == 204""",
  "ipykernel": "import ipykernel.kernelspec; assert ipykernel.kernelspec.get_kernel_dict()['argv']",
  "jax": "assert jax.jit(lambda x: x + 1)(1) == 2",
  "jaxtyping": """
import jaxtyping
assert isinstance(numpy.ones(3), jaxtyping.Float[numpy.ndarray, 'n'])""",
  "jinja2": "import jinja2; assert jinja2.Template('{{ x }}').render(x=1) == '1'",
  "jsonschema": """
import jsonschema
assert not jsonschema.Draft202012Validator({'type': 'string'}).is_valid(1)""",
  "llguidance": """
import llguidance
assert 'integer' in llguidance.LLMatcher.grammar_from_json_schema({'type': 'integer'})""",
  "lm-eval": """
from lm_eval.api import task
assert task.ConfigurableTask""",
  "math-verify": """
import math_verify
assert math_verify.verify(math_verify.parse('$\\\\frac{1}{2}$'), math_verify.parse('0.5'))""",
  "matplotlib": """
import matplotlib.figure
matplotlib.figure.Figure().savefig(f'{tmp}/x.svg')""",
  "ml-collections": "import ml_collections; assert ml_collections.ConfigDict({'x': 1}).x == 1",
  "nbclient": """
import nbclient, nbformat
assert nbclient.NotebookClient(nbformat.v4.new_notebook()).create_kernel_manager()""",
  "numpy": "assert (numpy.ones((2, 2)) @ numpy.ones((2, 2)) == 2).all()",
  "openai": "import openai; assert openai.OpenAI(api_key='x').chat.completions",
  "optax": "import optax; assert optax.adamw(1e-3).init({'x': jax.numpy.ones(3)})",
  "orbax-checkpoint": """
import orbax.checkpoint as ocp
with ocp.StandardCheckpointer() as checkpointer:
  checkpointer.save(f'{tmp}/orbax', {'x': jax.numpy.ones(3)})
with ocp.StandardCheckpointer() as checkpointer:
  assert (checkpointer.restore(f'{tmp}/orbax')['x'] == 1).all()""",
  "pebble": """
import pebble
with pebble.ThreadPool(1) as pool: assert pool.schedule(len, args=['ab']).result() == 2""",
  "portpicker": "import portpicker; assert portpicker.pick_unused_port() > 0",
  "prometheus-client": """
import prometheus_client
registry = prometheus_client.CollectorRegistry()
prometheus_client.Counter('x', 'y', registry=registry).inc()
assert b'x_total 1.0' in prometheus_client.generate_latest(registry)""",
  "pyarrow": """
import pyarrow.parquet
pyarrow.parquet.write_table(pyarrow.table({'x': [1]}), f'{tmp}/x.parquet')
assert pyarrow.parquet.read_table(f'{tmp}/x.parquet').to_pylist() == [{'x': 1}]""",
  "pydantic": "import pydantic; assert pydantic.TypeAdapter(int).validate_python('1') == 1",
  "pytest": "import pytest; assert 1.0 == pytest.approx(1.0)",
  "pytest-xdist": "import xdist.plugin; assert xdist.plugin.pytest_addoption",
  "pyyaml": "import yaml; assert yaml.safe_load('x: [1]') == {'x': [1]}",
  "regex": "import regex; assert regex.findall(r'\\p{Han}', 'a\u4e00') == ['\u4e00']",
  "rensa": """
import rensa
hashes = rensa.RMinHash(num_perm=8, seed=1); hashes.update(['a'])
assert len(hashes.digest()) == 8""",
  "rich": "import rich.text; assert rich.text.Text.from_markup('[b]x[/b]').plain == 'x'",
  "ruff": "import ruff; assert ruff.find_ruff_bin()",
  "safetensors": """
import safetensors.numpy
found = safetensors.numpy.load(safetensors.numpy.save({'x': numpy.ones(3)}))
assert found['x'].sum() == 3""",
  "scann": """
import scann
points = numpy.random.default_rng(0).normal(size=(20, 4)).astype('float32')
searcher = scann.scann_ops_pybind.builder(points, 1, 'dot_product').score_brute_force().build()
assert searcher.search_batched(points)[0].shape == (20, 1)""",
  "scikit-learn": """
from sklearn.feature_extraction.text import TfidfVectorizer
assert TfidfVectorizer().fit_transform(['one two', 'two']).shape == (2, 2)""",
  "scipy": "import scipy.stats; assert scipy.stats.norm.cdf(0) == 0.5",
  "sentencepiece": """
import io, sentencepiece
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
  sentence_iterator=iter(['abc abd'] * 9), model_writer=model, vocab_size=9, minloglevel=2,
  hard_vocab_limit=False)
processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
assert processor.decode(processor.encode('abc')) == 'abc'
from sentencepiece import sentencepiece_model_pb2
assert sentencepiece_model_pb2.ModelProto.FromString(model.getvalue()).pieces""",
  "seqio": """
import seqio
source = seqio.FunctionDataSource(
  lambda split, shuffle_files, seed=None: tensorflow.data.Dataset.from_tensors({'x': [1, 2]}),
  splits=['train'])
features = {'x': seqio.Feature(seqio.PassThroughVocabulary(9), add_eos=False)}
seqio.TaskRegistry.add('x', source, preprocessors=[], output_features=features)
[record] = seqio.get_mixture_or_task('x').get_dataset({'x': 2}, 'train').as_numpy_iterator()
assert list(record['x']) == [1, 2]""",
  "submitit": """
import submitit
job = submitit.AutoExecutor(f'{tmp}/submitit', cluster='debug').submit(len, 'ab')
assert job.result() == 2""",
  "tensorboardx": """
import tensorboardX
with tensorboardX.SummaryWriter(f'{tmp}/curves') as writer: writer.add_scalar('x', 1.0, 0)""",
  "tensorflow": "import tensorflow; assert int(tensorflow.constant(1) + 1) == 2",
  "tensorstore": """
import tensorstore
store = tensorstore.open({'driver': 'zarr', 'kvstore': 'memory://'}, dtype='int32', shape=[2],
  create=True).result()
store.write([1, 2]).result(); assert store.read().result().sum() == 3""",
  "threadpoolctl": "import threadpoolctl; assert threadpoolctl.threadpool_info()",
  "tokenizers": """
import tokenizers
model = tokenizers.models.WordLevel({'a': 0}, unk_token='a')
assert tokenizers.Tokenizer(model).encode('a').ids == [0]""",
  "torch": "import torch; assert torch.ones(2, 2).sum() == 4",
  "transformers": """
import transformers
assert transformers.LlamaConfig(vocab_size=8).vocab_size == 8 and transformers.AutoTokenizer""",
  "uvicorn": "import uvicorn; assert uvicorn.Config('x:y', port=1).port == 1",
  "wandb": """
import wandb
run = wandb.init(mode='offline', dir=tmp, settings=wandb.Settings(silent=True))
run.log({'x': 1}); run.finish()""",
  "xmanager": """
from xmanager import xm
assert xm.JobRequirements(cpu=1).task_requirements""",
  "zstandard": """
import zstandard
assert zstandard.decompress(zstandard.compress(b'a')) == b'a'""",
}
# One process for all: what one package loads must not break another.
_PROGRAM = """
import importlib.util, json, sys, tempfile, traceback
if importlib.util.find_spec("triton"):
  import triton  # as in `evaluation.tasks.registry`
import jax, numpy, tensorflow
with tempfile.TemporaryDirectory() as tmp:
  for name, use in json.load(sys.stdin):
    print(json.dumps(["begins", name, ""]), flush=True)
    try:
      exec(use, {"tmp": tmp, "jax": jax, "numpy": numpy, "tensorflow": tensorflow})
      error = ""
    except BaseException:
      error = traceback.format_exc()
    print("\\n" + json.dumps(["ends", name, error]), flush=True)
"""


def _requirements():
  """Returns the packages that pyproject names: of the package itself, of the extras."""
  path = pathlib.Path(__file__).resolve().parents[1] / "pyproject.toml"
  project = tomllib.loads(path.read_text())["project"]

  def names(requirements):
    return {re.match(r"[\w.-]+", line)[0].lower() for line in requirements}

  extras = set().union(*map(names, project["optional-dependencies"].values()))
  return names(project["dependencies"]), extras


_ALWAYS, _EXTRAS = _requirements()


def _is_installed(name):
  try:
    return bool(importlib.metadata.distribution(name))
  except importlib.metadata.PackageNotFoundError:
    return False


def test_every_requirement_has_a_use_here():
  assert sorted(_USES) == sorted(_ALWAYS | _EXTRAS)


@pytest.fixture(scope="module")
def errors():
  """Returns package -> the traceback of its use, "" if there was none."""
  uses = [(name, _USES[name]) for name in sorted(_USES) if _is_installed(name)]
  command = [sys.executable, "-c", _PROGRAM]
  done = subprocess.run(
    command, input=json.dumps(uses), capture_output=True, text=True, timeout=600
  )
  events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
  found = {name: f"the process died in it: {done.stderr[-2000:]}" for _, name, _ in events}
  return found | {name: error for kind, name, error in events if kind == "ends"}


@pytest.mark.parametrize("name", sorted(_ALWAYS | _EXTRAS))
def test_a_package_is_imported_and_used(name, errors):
  if name not in _ALWAYS and not _is_installed(name):
    pytest.skip(f"{name} belongs to an extra that is not installed")
  assert errors.get(name, "it was not reached") == ""
