"""Emulates Google Cloud Storage on a port of loopback: `gcs_emulator.py PORT`.

Prints a line when it listens and exits when its standard input ends. It extends
`gcp-storage-emulator` by what tensorstore and our leases need: the generation of an object that is
read, and writes on condition of a generation.
"""

import http.server
import sys

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def _generation(storage, bucket, name):
  try:
    return storage.get_file_obj(bucket, name)["generation"]
  except NotFound:
    return "0"


def _read(handler):
  def read(request, response, storage, *args):
    handler(request, response, storage, *args)
    bucket, name = request.params["bucket_name"], request.params["object_id"]
    response["x-goog-generation"] = _generation(storage, bucket, name)

  return read


def _insert(request, response, storage, *args, insert=objects.insert):
  wanted = request.query.get("ifGenerationMatch")
  if wanted:
    name = request.query["name"][0] if "name" in request.query else request.data["meta"]["name"]
    if _generation(storage, request.params["bucket_name"], name) != wanted[0]:
      response.status = 412
      return
  insert(request, response, storage, *args)


def main() -> None:
  http.server.HTTPServer.request_queue_size = 128  # tensorstore opens as many connections at once
  replacements = {
    objects.get: _read(objects.get),
    objects.download: _read(objects.download),
    objects.insert: _insert,
  }
  for _, methods in server.HANDLERS:
    for method, handler in methods.items():
      methods[method] = replacements.get(handler, handler)
  objects.insert = _insert
  running = server.create_server(
    "127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket"
  )
  running.start()
  print("listening", flush=True)
  sys.stdin.read()
  running.stop()


if __name__ == "__main__":
  main()
