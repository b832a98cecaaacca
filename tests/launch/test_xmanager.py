"""The xmanager backend: its own local executor where it is installed, and the plans for clusters.

xmanager may live in an environment of its own: SELFIMPROVE_XMANAGER_PYTHON names its interpreter.
"""

import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import pytest

from selfimprove_jax.launch import experiment as experiment_lib
from selfimprove_jax.launch import kubernetes, resource
from selfimprove_jax.launch.experiment import Experiment

MAIN = ("python", "-m", "selfimprove_jax.main")
_LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "tools" / "launch.py"
_TRIES = (
  "import pathlib, sys\n"
  "flags = dict(flag.split('=', 1) for flag in sys.argv[1:])\n"
  "folder = pathlib.Path(flags['--workdir'])\n"
  "folder.mkdir(parents=True, exist_ok=True)\n"
  "tries = len(list(folder.glob('try*')))\n"
  "(folder / f'try{tries}').touch()\n"
  "print('no room in', folder.name)\n"
  "sys.exit(3 if folder.name == 'a-seed0' or (tries == 0 and folder.name == 'b-seed1') else 0)\n"
)


@pytest.fixture(scope="module")
def xmanager_python():
  python = os.environ.get("SELFIMPROVE_XMANAGER_PYTHON", sys.executable)
  if subprocess.run([python, "-c", "import xmanager"], capture_output=True).returncode:
    pytest.skip("xmanager is not installed: pip install 'selfimprove_jax[xmanager]'")
  return python


@pytest.mark.slow
def test_its_local_executor_runs_retries_and_reports_every_unit(
  xmanager_python, launch, launch_file, run_folder, tmp_path
):
  path = launch_file(_TRIES)
  flags = ("--backend=xmanager", "--max_parallel=3", f"--python={sys.executable}")
  options = {"python": xmanager_python, "env": {"HOME": str(tmp_path)}}
  process = launch(path, *flags, **options)
  assert process.returncode == 1, process.stdout + process.stderr
  assert re.search(r"xmanager experiment \d+", process.stdout)
  assert re.search(r"a-seed0: xmanager's work unit \d+ failed", process.stdout)
  assert "a-seed0: FAILED, 2 attempts, exit code 3" in process.stdout
  assert "    no room in a-seed0" in process.stdout
  assert "b-seed1: complete, 2 attempts" in process.stdout
  assert (tmp_path / ".xmanager").exists()
  tries = {folder.name: len(list(folder.glob("try*"))) for folder in run_folder.glob("*-seed*")}
  once = dict.fromkeys(("a-seed1", "b-seed0", "c-seed0", "c-seed1"), 1)
  assert tries == {"a-seed0": 2, "b-seed1": 2} | once
  launch(path, *flags, **options)
  assert len(list((run_folder / "c-seed1").glob("try*"))) == 1


def test_units_of_its_local_executor_save_on_a_signal(
  xmanager_python, launch_argv, launch_file, run_folder, tmp_path
):
  path = launch_file(
    "import pathlib, signal, sys, time\n"
    "folder = pathlib.Path(sys.argv[-1].partition('=')[2])\n"
    "folder.mkdir(parents=True)\n"
    "def save(*_):\n"
    "  (folder / 'saved').touch()\n"
    "  sys.exit(143)\n"
    "signal.signal(signal.SIGTERM, save)\n"
    "(folder / 'ready').touch()\n"
    "time.sleep(60)\n",
    arms={"a": {}},
    seeds=(0,),
  )
  argv = launch_argv(
    path, "--backend=xmanager", f"--python={sys.executable}", python=xmanager_python
  )
  options = {"stdout": subprocess.PIPE, "text": True, "env": os.environ | {"HOME": str(tmp_path)}}
  with subprocess.Popen(argv, cwd=_LAUNCH.parents[1], **options) as launcher:
    deadline = time.monotonic() + 60
    while not (run_folder / "a-seed0" / "ready").exists():
      assert time.monotonic() < deadline
      time.sleep(0.05)
    launcher.terminate()
    output, _ = launcher.communicate(timeout=30)
  assert launcher.returncode == 143
  assert "a-seed0: stopped after" in output
  assert (run_folder / "a-seed0" / "saved").exists()


@pytest.fixture
def cluster(tmp_path):
  """A server that takes Kubernetes objects as a cluster's does, keeps them, and its kubeconfig."""
  taken: list[dict] = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = self.rfile.read(int(self.headers["Content-Length"]))
      taken.append({"path": self.path, **json.loads(body)})
      self.send_response(201)
      self.send_header("Content-Type", "application/json")
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    context = {"cluster": "c", "user": "u"}
    config = {
      "apiVersion": "v1",
      "kind": "Config",
      "clusters": [{"name": "c", "cluster": {"server": address}}],
      "users": [{"name": "u", "user": {}}],
      "contexts": [{"name": "x", "context": context}],
      "current-context": "x",
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    yield tmp_path / "kubeconfig", taken
    server.shutdown()


@pytest.mark.slow
def test_its_kubernetes_executor_submits_every_unit_with_its_tpu_slice(
  xmanager_python, launch, launch_file, cluster, tmp_path
):
  kubeconfig, taken = cluster
  process = launch(
    launch_file("", command=MAIN, seeds=(0,), resource="tpu('v5p:4x4x4')"),
    *("--backend=xmanager", "--executor=kubernetes", "--image=r/i:1", "--root=gs://b/runs"),
    python=xmanager_python,
    env={"HOME": str(tmp_path), "KUBECONFIG": str(kubeconfig), "NO_PROXY": "127.0.0.1"},
  )
  assert process.returncode == 0, process.stdout + process.stderr
  assert process.stdout.count("submitted to kubernetes") == 3
  services, jobs = "/api/v1/namespaces/default/services", "/apis/batch/v1/namespaces/default/jobs"
  assert [item["path"] for item in taken] == [services, jobs] * 3
  for item, name in zip(taken[1::2], "abc"):
    [container] = item["spec"]["template"]["spec"]["containers"]
    assert container["command"][:3] == ["python", "-m", "selfimprove_jax.main"]
    assert container["command"][-1] == f"--workdir=gs://b/runs/sweep/{name}-seed0"
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    assert item["spec"]["completions"] == 16


@pytest.mark.slow
def test_vertex_finds_a_machine_for_a_unit(xmanager_python, tmp_path):
  script = tmp_path / "machines.py"
  script.write_text(
    "from selfimprove_jax.launch import resource, xm as backend\n"
    "from selfimprove_jax.launch.experiment import Experiment, work_units\n"
    "from xmanager import xm, xm_local\n"
    "from xmanager.cloud import vertex\n"
    "for made in (resource.gpu('a100', devices=8), resource.gpu('l4')):\n"
    "  e = Experiment(name='x', config='c.py', arms={'a': {}}, resource=made)\n"
    "  [unit] = work_units(e, root='gs://b/runs', python='python')\n"
    "  requirements = xm.JobRequirements(**backend.vertex_resources(unit))\n"
    "  executor = xm_local.Vertex(requirements)\n"
    "  spec = vertex.get_machine_spec(xm.Job(executable=None, executor=executor))\n"
    "  print(spec['machine_type'])\n"
  )
  process = subprocess.run(
    [xmanager_python, script],
    capture_output=True,
    text=True,
    timeout=120,
    env=os.environ | {"PYTHONPATH": str(_LAUNCH.parents[1])},
  )
  assert process.stdout.split() == ["a2-highgpu-8g", "g2-standard-4"], process.stderr


def _unit(made):
  experiment = Experiment(
    name="my_sweep",
    config="configs/sbp_quick.py",
    arms={"a": {}},
    resource=made,
    environment={"A_NAME": "x"},
  )
  [unit] = experiment_lib.work_units(experiment, root="gs://bucket/runs", python="python")
  return unit


def test_a_kubernetes_job_requests_a_tpu_slice_with_one_pod_per_host():
  unit = _unit(resource.tpu("v5p:4x4x8", hours=2.0))
  service, job = kubernetes.objects("my_sweep", unit, image="r/i:1", retries=2, grace_s=90.0)
  spec, pod = job["spec"], job["spec"]["template"]["spec"]
  assert spec["completionMode"] == "Indexed"
  assert spec["completions"] == spec["parallelism"] == 32
  assert spec["backoffLimit"] == 64
  assert spec["activeDeadlineSeconds"] == 7200
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
    "cloud.google.com/gke-tpu-topology": "4x4x8",
  }
  assert pod["subdomain"] == service["metadata"]["name"] == "my-sweep-a-seed0"
  assert service["spec"]["selector"] == spec["template"]["metadata"]["labels"]
  [container] = pod["containers"]
  assert container["resources"]["limits"] == {"google.com/tpu": "4"}
  assert container["command"] == list(unit.argv)
  assert unit.argv[-1] == "--workdir=gs://bucket/runs/my_sweep/a-seed0"
  assert container["env"] == [{"name": "A_NAME", "value": "x"}]


def test_a_kubernetes_job_of_gpus_names_their_kind():
  unit = _unit(resource.gpu("h200", devices=8, memory_gib=900, cpus=100))
  _, job = kubernetes.objects("my_sweep", unit, image="r/i:1", retries=0, grace_s=90.0)
  pod = job["spec"]["template"]["spec"]
  assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h200-141gb"}
  assert pod["containers"][0]["resources"] == {
    "limits": {"nvidia.com/gpu": "8"},
    "requests": {"cpu": "100", "memory": f"{900 * 1024}Mi"},
  }


def test_the_plan_for_kubernetes_is_objects_that_kubectl_reads(launch, launch_file):
  path = launch_file("", command=MAIN, resource="tpu('v6e:4x4')")
  process = launch(
    path,
    *("--backend=xmanager", "--executor=kubernetes", "--image=r/i:1", "--root=gs://b/runs"),
    "--dry_run",
  )
  assert process.returncode == 0, process.stderr
  lists = re.findall(r"<<'END'\n(.*?)\nEND", process.stdout, re.DOTALL)
  assert len(lists) == 6
  assert [item["kind"] for item in json.loads(lists[0])["items"]] == ["Service", "Job"]
  assert "16 x v6e:4x4, 4 processes on 4 hosts" in process.stdout
  assert "--workdir=gs://b/runs/sweep/a-seed0" in process.stdout


@pytest.mark.parametrize(
  ("arguments", "made", "told"),
  [
    (["--executor=kubernetes"], "cpu()", "needs --image"),
    (["--executor=kubernetes", "--image=i"], "cpu()", "needs --root=gs://"),
    (
      ["--executor=vertex", "--image=i", "--root=gs://b/r"],
      "tpu('v5p:4x4x4')",
      "serves one process on cpu, l4, a100, and a unit takes 64 x v5p:4x4x4",
    ),
  ],
)
def test_units_that_an_executor_cannot_run_are_refused(arguments, made, told, launch, launch_file):
  process = launch(launch_file("", resource=made), "--backend=xmanager", *arguments)
  assert process.returncode == 1
  assert told in process.stderr
  assert "Traceback" not in process.stderr


def test_without_the_package_the_backend_says_what_to_install(launch, launch_file, tmp_path):
  (tmp_path / "xmanager.py").write_text("raise ImportError('no such package here')\n")
  path = launch_file("", arms={"a": {}})
  process = launch(path, "--backend=xmanager", env={"PYTHONPATH": str(tmp_path)})
  assert process.returncode == 1
  assert "pip install 'selfimprove_jax[xmanager]'" in process.stderr
