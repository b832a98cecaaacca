"""The notebook experiments/first_steps.ipynb, executed."""

import pathlib
import re

import pytest

REPO = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_the_notebook_runs_and_its_model_learns():
  nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
  notebook = nbformat.read(REPO / "experiments" / "first_steps.ipynb", as_version=4)
  where = {"metadata": {"path": str(REPO)}}
  nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
  outputs = [o for cell in notebook.cells for o in cell.get("outputs", ())]
  printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
  losses = [float(x) for x in re.findall(r"([\d.]+) nats per held-out token", printed)]
  assert len(losses) == 6
  assert losses[-1] < 0.7 * losses[0]
  assert printed.count("Return the") >= 4  # the samples
