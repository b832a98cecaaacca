import dataclasses
import gzip
import itertools
import json
import os
import sys
import tracemalloc
import types

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from selfimprove_jax.data import corpora, files
from selfimprove_jax.data.corpora import (
  DocstringsConfig,
  HuggingFaceConfig,
  JsonlConfig,
  ParquetConfig,
  SourceConfig,
  TextFolderConfig,
)
from selfimprove_jax.runtime.config import parse, section


def _lines(*records):
  return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_the_docstrings_of_a_package_have_names_without_paths():
  documents = list(corpora.read_documents(DocstringsConfig(packages=("numpy",), min_chars=400)))
  by_id = {document.id: document for document in documents}
  norm = by_id["numpy/linalg/_linalg.py:norm"]
  assert norm.group == "numpy/linalg/_linalg.py"
  assert norm.text.startswith("Matrix or vector norm.\n\n")
  assert "\n    \n" not in norm.text  # cleaned of its indentation
  assert len(by_id) == len(documents)
  assert all(len(document.text) >= 400 for document in documents)
  assert not any("/tests/" in document.id for document in documents)
  groups = [document.group for document in documents]
  assert groups == sorted(groups)


def test_the_standard_library_is_a_package():
  config = DocstringsConfig(packages=("stdlib",), min_chars=2000, max_chars=3000)
  lengths = [len(document.text) for document in itertools.islice(corpora.read_documents(config), 5)]
  assert len(lengths) == 5 and min(lengths) >= 2000 and max(lengths) <= 3000


def test_docstrings_are_found_where_definitions_nest(tmp_path, monkeypatch):
  package = tmp_path / "odd_package"
  package.mkdir()
  package.joinpath("__init__.py").write_bytes(b"def broken(:\n  '''never read'''\n")
  package.joinpath("null.py").write_bytes(b"'''text'''\0")
  package.joinpath("deep.py").write_text("'''text'''\nif a: 0\n" + "elif a: 0\n" * 3_000)
  package.joinpath("folder.py").mkdir()
  package.joinpath("latin.py").write_bytes("# coding: latin-1\n'''Caf\xe9.'''\n".encode("latin-1"))
  package.joinpath("module.py").write_text(
    '''"""Module."""
import nothing_that_exists
try:
  class A:
    """A."""
    @property
    def x(self):
      """Getter."""
    @x.setter
    def x(self, value):
      """Setter."""
except ImportError:
  if True:
    async def f():
      """
      Outer,

        indented.
      """
      def g(): """Inner \\d."""
s = """not documentation"""
def surrogate(): """Half \\ud800."""
'''
  )
  monkeypatch.syspath_prepend(tmp_path)
  documents = list(corpora.read_documents(DocstringsConfig(packages=("odd_package",), min_chars=1)))
  assert [(document.id, document.text) for document in documents] == [
    ("odd_package/latin.py:__doc__", "Café."),
    ("odd_package/module.py:__doc__", "Module."),
    ("odd_package/module.py:A", "A."),
    ("odd_package/module.py:A.x", "Getter."),
    ("odd_package/module.py:A.x@2", "Setter."),
    ("odd_package/module.py:f", "Outer,\n\n  indented."),
    ("odd_package/module.py:f.g", "Inner \\d."),
  ]


def test_a_missing_package_is_named():
  with pytest.raises(corpora.CorpusError, match="'no_such_package' is not installed"):
    list(corpora.read_documents(DocstringsConfig(packages=("no_such_package",))))


def test_without_packages_all_that_is_installed_is_read():
  packages = corpora._installed_packages()
  assert {"stdlib", "numpy", "jax"} <= set(packages)
  assert "selfimprove_jax" not in packages  # or the corpus would change with our own code


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_is_read_in_order_of_path_and_line(tmp_path, suffix):
  compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
  second = compress(_lines({"id": 3, "text": "é", "book": "x"}).rstrip())
  first = compress(_lines({"id": "a", "text": "one", "book": "x"})) + compress(
    b"\n" + _lines({"id": "b", "text": "two\nlines", "book": "y"})
  )
  tmp_path.joinpath(f"2.jsonl{suffix}").write_bytes(second)
  tmp_path.joinpath(f"1.jsonl{suffix}").write_bytes(first)
  pattern = str(tmp_path / f"*.jsonl{suffix}")
  assert list(
    corpora.read_documents(JsonlConfig(paths=(pattern,), id_field="id", group_field="book"))
  ) == [
    corpora.Document("a", "x", "one"),
    corpora.Document("b", "y", "two\nlines"),
    corpora.Document("3", "x", "é"),
  ]
  by_line = list(corpora.read_documents(JsonlConfig(paths=(pattern,))))
  assert [d.id for d in by_line] == [
    f"{name}.jsonl{suffix}:{n}" for name, n in ((1, 1), (1, 3), (2, 1))
  ]
  assert [d.group for d in by_line] == [d.id for d in by_line]


@pytest.mark.parametrize(
  "line, fault",
  [
    (b'{"id": 1, "text": "cut off', "not JSON"),
    (b'{"id": 1, "txt": "a"}', "no field 'text'; the record has"),
    (b'{"text": "a"}', "no field 'id'"),
    (b'{"id": 1, "text": null}', "NoneType, not text"),
    (b'{"id": 1, "text": "caf\xe9"}', "not UTF-8 at byte 22 .0xe9"),
    (b'{"id": 1, "text": "\\ud800"}', "half a surrogate pair"),
    (b'["a"]', "the record has list"),
    (b"[" * 100_000, "nested too deeply"),
    (
      b'{"id": 1, "text": ' + b"[" * 1_100 + b"]" * 1_100 + b"}",
      "nested too deeply|list, not text",
    ),
    (b'{"id": 1, "text": ' + b"9" * 5_000 + b"}", "Exceeds the limit"),
  ],
)
def test_a_bad_line_is_named_by_file_and_number_and_can_be_skipped(tmp_path, line, fault):
  path = tmp_path / "bad.jsonl"
  path.write_bytes(_lines({"id": 7, "text": "a"}) + line + b"\n" + _lines({"id": 8, "text": "b"}))
  where = rf"bad\.jsonl, line 2: .*{fault}"
  config = JsonlConfig(paths=(str(path),), id_field="id")
  with pytest.raises(corpora.CorpusError, match=where):
    list(corpora.read_documents(config))
  rejected = []
  read = corpora.read_documents(config, on_bad=rejected.append)
  assert [document.id for document in read] == ["7", "8"]
  assert len(rejected) == 1
  with pytest.raises(corpora.CorpusError, match=where):
    raise corpora.CorpusError(rejected[0])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_cut_short_is_named(tmp_path, suffix):
  data = _lines(*({"id": i, "text": "some text " * 20} for i in range(9000)))
  whole = gzip.compress(data) if suffix == ".gz" else zstandard.ZstdCompressor().compress(data)
  tmp_path.joinpath(f"cut.jsonl{suffix}").write_bytes(whole[:-10])
  config = JsonlConfig(paths=(str(tmp_path / f"cut.jsonl{suffix}"),))
  with pytest.raises(corpora.CorpusError, match=rf"cut.jsonl{suffix}, .*cannot be decompressed"):
    list(corpora.read_documents(config))


def test_no_matching_file_is_an_error(tmp_path):
  with pytest.raises(corpora.CorpusError, match="no file matches"):
    list(corpora.read_documents(JsonlConfig(paths=(str(tmp_path / "*.jsonl"),))))
  with pytest.raises(corpora.CorpusError, match="matches"):
    list(corpora.read_documents(TextFolderConfig(folder=str(tmp_path))))


def test_a_text_folder_groups_by_folder_and_names_what_is_not_utf8(tmp_path):
  tmp_path.joinpath("b", "c").mkdir(parents=True)
  tmp_path.joinpath("b", "c", "2.txt").write_text("two", encoding="utf-8")
  tmp_path.joinpath("a.txt").write_text("one", encoding="utf-8")
  tmp_path.joinpath("b", "bad.txt").write_bytes(b"abc\xff")
  rejected = []
  read = corpora.read_documents(TextFolderConfig(folder=str(tmp_path)), on_bad=rejected.append)
  assert list(read) == [
    corpora.Document("a.txt", "a.txt", "one"),
    corpora.Document("b/c/2.txt", "b/c", "two"),
  ]
  assert len(rejected) == 1 and "bad.txt: not UTF-8 at byte 3" in rejected[0]
  with pytest.raises(corpora.CorpusError, match="byte 3"):
    list(corpora.read_documents(TextFolderConfig(folder=str(tmp_path))))


@pytest.mark.parametrize(
  ("group_by", "names", "groups"),
  [
    ("auto", ["a.txt", "b.txt"], ["a.txt", "b.txt"]),  # flat
    ("auto", ["x/a.txt", "x/b.txt"], ["x/a.txt", "x/b.txt"]),
    ("auto", ["a.txt", "x/a.txt", "x/b.txt"], ["a.txt", "x", "x"]),
    ("folder", ["a.txt", "b.txt", "x/a.txt"], [".", ".", "x"]),
    ("file", ["a.txt", "x/a.txt", "x/b.txt"], ["a.txt", "x/a.txt", "x/b.txt"]),
  ],
)
def test_files_are_grouped_by_folder_where_there_are_several(tmp_path, group_by, names, groups):
  for name in names:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(name)
  source = TextFolderConfig(folder=str(tmp_path), group_by=group_by)
  assert [document.group for document in corpora.read_documents(source)] == groups


def test_hidden_files_byte_order_marks_pipes_and_odd_names_do_no_harm(tmp_path):
  tmp_path.joinpath("a[1].txt").write_bytes(b"\xef\xbb\xbfone")
  tmp_path.joinpath("._a.txt").write_bytes(b"\0\x05\x16\x07\xff")
  tmp_path.joinpath("__MACOSX").mkdir()
  tmp_path.joinpath("__MACOSX", "._a.txt").write_bytes(b"\0\x05\x16\x07\xff")
  os.mkfifo(tmp_path / "pipe.txt")
  with open(os.path.join(os.fsencode(tmp_path), b"b\xff.txt"), "wb") as file:
    file.write(b"two")
  found = list(corpora.read_documents(TextFolderConfig(folder=str(tmp_path))))
  assert [(d.id, d.text) for d in found] == [("a[1].txt", "one"), ("b\\xff.txt", "two")]

  tmp_path.joinpath("data[1].jsonl").write_bytes(b"\xef\xbb\xbf" + _lines({"text": "one"}))
  path = str(tmp_path / "data[1].jsonl")
  expected = corpora.Document("data[1].jsonl:1", "data[1].jsonl:1", "one")
  assert list(corpora.read_documents(JsonlConfig(paths=(path,)))) == [expected]
  with pytest.raises(corpora.CorpusError, match=r"no file matches .*pipe\.txt.*pipes are not read"):
    list(corpora.read_documents(JsonlConfig(paths=(str(tmp_path / "pipe.txt"),))))


def _compressed_zeros(suffix, num_bytes):
  if suffix == ".gz":
    return gzip.compress(bytes(num_bytes))
  stream = zstandard.ZstdCompressor(level=1).compressobj()
  pieces = [stream.compress(bytes(1 << 24)) for _ in range(num_bytes >> 24)]
  return b"".join(pieces) + stream.flush()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_without_end_is_rejected_in_bounded_memory(tmp_path, suffix, monkeypatch):
  monkeypatch.setattr(files, "MAX_BYTES", 1000)
  zeros = bytes(1 << 26) if not suffix else _compressed_zeros(suffix, 1 << 26)
  after = _lines({"text": "b"})
  if suffix == ".gz":
    after = gzip.compress(b"\n" + after)
  elif suffix == ".zst":
    after = zstandard.ZstdCompressor().compress(b"\n" + after)
  else:
    after = b"\n" + after
  path = tmp_path / f"bomb.jsonl{suffix}"
  path.write_bytes(zeros + after)
  rejected = []
  tracemalloc.start()
  read = corpora.read_documents(JsonlConfig(paths=(str(path),)), on_bad=rejected.append)
  assert [document.text for document in read] == ["b"]
  assert tracemalloc.get_traced_memory()[1] < 1 << 26
  tracemalloc.stop()
  assert len(rejected) == 1 and "line 1: the line is longer than 1000 bytes" in rejected[0]
  path.with_name("long.txt").write_bytes(b"x" * 1001)
  with pytest.raises(corpora.CorpusError, match=r"long.txt: longer than 1000 bytes"):
    list(corpora.read_documents(TextFolderConfig(folder=str(tmp_path))))


def test_parquet_is_read_like_json_lines(tmp_path):
  table = {
    "text": ["one", None, "two"],
    "n": [7, 8, 9],
    "book": ["x", "x", "y"],
    "other": [1, 2, 3],
  }
  pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet", row_group_size=2)
  config = ParquetConfig(paths=(str(tmp_path / "*.parquet"),))
  rejected = []
  read = list(corpora.read_documents(config, on_bad=rejected.append))
  assert read == [
    corpora.Document("a.parquet:1", "a.parquet:1", "one"),
    corpora.Document("a.parquet:3", "a.parquet:3", "two"),
  ]
  assert len(rejected) == 1 and "a.parquet, row 2: field 'text' is NoneType" in rejected[0]
  fields = dataclasses.replace(config, id_field="n", group_field="book")
  assert next(corpora.read_documents(fields)) == corpora.Document("7", "x", "one")
  with pytest.raises(
    corpora.CorpusError, match=r"a.parquet: not one column 'body'; it has .*other"
  ):
    list(corpora.read_documents(dataclasses.replace(config, text_field="body")))
  whole = tmp_path.joinpath("a.parquet").read_bytes()
  tmp_path.joinpath("a.parquet").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(corpora.CorpusError, match=r"a.parquet, after row 0: cannot be read"):
    list(corpora.read_documents(config))


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
  tmp_path.joinpath("a.txt").write_text("one")

  def refused(path, mode):
    raise PermissionError(13, "Permission denied", path)

  monkeypatch.setattr(files, "open", refused, raising=False)
  with pytest.raises(corpora.CorpusError, match=r"a.txt: Permission denied"):
    list(corpora.read_documents(TextFolderConfig(folder=str(tmp_path)), on_bad=print))


def test_hugging_face_needs_its_package_and_streams_a_split(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(corpora.CorpusError, match="hub"):
    list(corpora.read_documents(HuggingFaceConfig(name="a/b")))

  def load_dataset(name, config_name, *, split, streaming, trust_remote_code):
    assert (name, config_name, split, streaming) == ("a/b", "en", "dev", True)
    assert trust_remote_code is False
    return iter([{"body": "one"}, {"body": None}])

  monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
  config = HuggingFaceConfig(name="a/b", split="dev", text_field="body", config_name="en")
  read = corpora.read_documents(config)
  assert next(read) == corpora.Document("a/b:dev:0", "a/b:dev:0", "one")
  with pytest.raises(corpora.CorpusError, match="a/b, split dev, record 1"):
    next(read)


@section
class _Corpus:
  source: SourceConfig


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"kind": "docstring"}, "docstrings.*jsonl.*text_folder.*huggingface"),
    ({"kind": "jsonl", "paths": ["x"], "text_feild": "a"}, "did you mean 'text_field'"),
    ({"kind": "jsonl", "paths": []}, "paths=.*at least 1 item"),
    ({"kind": "text_folder"}, "folder: is missing"),
  ],
)
def test_wrong_options_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    parse(_Corpus, {"source": values})


def test_a_real_textbook_corpus_is_read(real_data):
  path = str(real_data / "corpora" / "openstax.jsonl.gz")
  documents = list(corpora.read_documents(JsonlConfig(paths=(path,), group_field="book")))
  assert len(documents) == 2552
  assert len({document.group for document in documents}) == 16
