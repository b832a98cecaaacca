"""Our scores are lm-eval's: log-likelihoods, predictions, greedy flags, perplexities, texts."""

import pytest

from tests.evaluation import parity, tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory, one_device_mesh):
  """A tiny Llama whose tokenizer begins a text with BOS."""
  pytest.importorskip("lm_eval", reason="the extra `parity` is not installed")
  folder = tiny_model.save(tmp_path_factory.mktemp("model"), adds_bos=True, max_positions=1024)
  return parity.open_models(folder, one_device_mesh)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("task", parity.TASKS)
def test_scores_are_those_of_lm_eval(task, models, real_data):
  found = parity.compare(task, *models, real_data / "evals", 20)
  assert found.rows == 20
  assert found.holds, found
