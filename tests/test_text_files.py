"""Files are read where they say what they mean, in every packing, and refused with file and line where they do not."""

import bz2
import gzip
import json
import lzma

import pandas as pd
import pyarrow
import pytest

from hfprune_nb import text_files
from hfprune_nb.errors import UserError

RECORDS = [{"text": "café"}, {"text": "two\u2028lines, one record"}, {"text": "😀 pair"}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
PACKED = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


def records(file):
    return [record for _, record in text_files.read_records(file)]


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("text", [LINES, json.dumps(RECORDS, indent=1), "\n" + LINES.replace("\n", "\n\n"), "[]"])
def test_every_packing_of_json_gives_its_records(tmp_path, packing, text):
    for name in ("data.JSONL", "data.json", "c4-train.00000-of-01024.json"):
        file = tmp_path / (name + packing.upper())
        file.write_bytes(PACKED[packing](text.encode()))
        assert records(file) == (RECORDS if text != "[]" else [])


@pytest.mark.parametrize("packing", list(PACKED)[1:])
def test_shards_packed_one_after_the_other_are_one_file(tmp_path, packing):
    (tmp_path / "data.jsonl").write_bytes(PACKED[packing](LINES.encode()) * 2)
    assert records(tmp_path / "data.jsonl") == RECORDS * 2


def test_windows_and_old_mac_files_read_as_any_other(tmp_path):
    for end in ("\r\n", "\r", "\n"):
        content = "\ufeff" + LINES.replace("\n", end)
        (tmp_path / "data.jsonl").write_bytes((content + content).encode())
        assert records(tmp_path / "data.jsonl") == RECORDS * 2
        (tmp_path / "data.txt").write_bytes(f"\ufeffone{end}two \x0b\x85{end}{end}three{end}".encode())
        assert text_files.read_text(tmp_path / "data.txt") == "one\ntwo \x0b\x85\n\nthree\n"


def test_parquet_records_say_where_they_stand(tmp_path):
    pd.DataFrame(RECORDS).to_parquet(tmp_path / "data.parquet")
    places, found = zip(*text_files.read_records(tmp_path / "data.parquet", "corpus"), strict=True)
    assert list(found) == RECORDS and places[2] == f"corpus {tmp_path}/data.parquet, record 3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("café\n".encode("latin-1"), "is not UTF-8 .byte 0xe9.: convert the file"),
        (b'{"a": 1}\n' + "这是".encode("gb18030"), "line 2 is not UTF-8"),
        (LINES.encode("utf-16"), "is UTF-16, not UTF-8: convert it, as `iconv -f UTF-16 "),
        (LINES.encode("utf-16-be"), "is UTF-16 or UTF-32, not UTF-8"),
        (LINES.encode("utf-32"), "is UTF-32, not UTF-8"),
        (b'{"a": 1}\n\n{"a"\n', "line 3 is no JSON"),
        (b'\n\n[{"a": 1},\n\n{"a" 2}]', "is no JSON .*line 5"),
        (b'{"a": 1}\n[1, 2]', r"line 2 is no record but \[1, 2\]: give an object"),
        (b'[{"a": 1}, "text"]', 'record 2 is no record but "text"'),
        (b'{"a": 1}\n{"a": ["x", {"b": "\\ud83d"}]}', r"line 2 holds half a character, '\\ud83d'"),
        (gzip.compress(LINES.encode(), mtime=0)[:-12], "cannot be read .*: check that the file is whole"),
        (PACKED[".zst"](LINES.encode())[:-5], "cannot be read .*: check that the file is whole"),
        (b"PK\x03\x04rest", "is a zip archive: unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer: run `git lfs pull`"),
    ],
)
def test_what_is_ambiguous_or_broken_gets_one_sentence(tmp_path, content, message):
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        records(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_parquet_file_gets_one_sentence(tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="corpus .*data.parquet cannot be read"):
        list(text_files.read_records(tmp_path / "data.parquet", "corpus"))


def test_files_are_told_from_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HFPRUNE_HOME", str(tmp_path / "kit"))
    for file in ("a.Jsonl.GZ", "table.csv", "kit/data/b.txt"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    suffixes = (".txt", *text_files.RECORD_SUFFIXES)
    assert text_files.find("a.Jsonl.GZ", "corpus", suffixes).name == "a.Jsonl.GZ"
    assert text_files.find("data/b.txt", "corpus", suffixes) == tmp_path / "kit" / "data" / "b.txt"
    for name in ("owner/name", "owner/name-v1.5:en", "name"):
        assert text_files.find(name, "corpus", suffixes) is None
    for name, message in {
        "table.csv": "corpus file table.csv is of an unknown format: give a path to a .txt, .jsonl",
        "kit": "corpus 'kit' is a folder",
        "none.json.gz": "corpus file none.json.gz does not exist",
        "./owner/name": "does not exist",
        "/data/c4/shard": "does not exist",
    }.items():
        with pytest.raises(UserError, match=message):
            text_files.find(name, "corpus", suffixes)
