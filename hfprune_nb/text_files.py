"""Text and records as users' files hold them: UTF-8, plain or compressed; what is ambiguous is refused with file and line."""

import bz2
import glob
import gzip
import importlib.util
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hfprune_nb import paths
from hfprune_nb.errors import UserError

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_ARCHIVES = {b"PK\x03\x04": "is a zip archive: unpack it", b"version https://git-lfs": "is a Git LFS pointer: run `git lfs pull`"}
# UTF-32 first, as its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^/\\]*)?")


def suffix(name: str | Path) -> str:
    """Return the suffix of a file name that says its format, in lower case: `.json` of `shard-01.json.gz`."""
    return next((part for part in reversed([part.lower() for part in Path(name).suffixes]) if part not in COMPRESSIONS), "")


def find(name: str | Path, what: str, suffixes: tuple[str, ...]) -> Path | None:
    """Return the local file `name`, looked up in the working directory, then in the project; None for what may be a hub id.

    what : the parameter, for sentences. Raises UserError for a path at which no file is, a folder, and a format that is not one
    of `suffixes`.
    """
    wanted = f"give a path to a {', '.join(suffixes)} file, plain or compressed ({', '.join(COMPRESSIONS)})"
    places = (Path(name).expanduser(), paths.project() / name)
    for file in filter(Path.is_file, places):
        if suffix(file) not in suffixes:
            raise UserError(f"{what} file {file} is of an unknown format: {wanted}")
        return file
    if any(map(Path.is_dir, places)):
        raise UserError(f"{what} {str(name)!r} is a folder: {wanted}")
    if _HUB_ID.fullmatch(str(name)) and suffix(name) not in suffixes:
        return None
    raise UserError(f"{what} file {name} does not exist: {wanted}")


def matching(pattern: str) -> list[Path]:
    """Return the files that a pattern such as `src/**/*.py` names, looked up in the project; none for an empty one.

    `transformers:*.py` are files of an installed package: with pinned versions the same text everywhere.
    """
    package, _, inside = pattern.partition(":")
    # One letter in front of a colon is a drive of Windows.
    spec = importlib.util.find_spec(package) if inside and len(package) > 1 and package.isidentifier() else None
    if spec and spec.submodule_search_locations:
        root, pattern = Path(spec.submodule_search_locations[0]), inside
    else:
        root = paths.project()
    found = glob.glob(str(Path(pattern).expanduser()), root_dir=root, recursive=True) if pattern else []
    return sorted(file for name in found if (file := root / name).is_file())


def read_text(file: str | Path, what: str = "file") -> str:
    """Return the text of a UTF-8 file, plain or compressed, without byte order marks and with line feeds as line ends.

    what : the parameter that names the file, for sentences. Raises UserError for a file that cannot be read, and for another
    encoding, with the line.
    """
    return "".join(_lines(Path(file), what))


def read_records(file: str | Path, what: str = "file") -> Iterator[tuple[str, dict]]:
    """Yield the records of a JSON-lines, JSON (one record per line or a list of them) or parquet file, and where each stands.

    The place is for sentences, as in `corpus web.jsonl, line 3`. Blank lines are no records. JSON may be compressed, and is text
    as `read_text` reads it. Raises UserError for what is no JSON, no record, or no text (half of a surrogate pair).
    """
    file = Path(file)
    if suffix(file) == ".parquet":
        yield from _parquet_records(file, what)
        return
    begins = next((line.lstrip() for line in _lines(file, what) if line.strip()), "")
    if begins.startswith("["):
        text = read_text(file, what)
        records = enumerate(_parse(text, f"{what} {file}"), 1)
        found = ((f"{what} {file}, record {number}", record, text) for number, record in records)
    else:
        lines = ((f"{what} {file}, line {number}", line) for number, line in enumerate(_lines(file, what), 1) if line.strip())
        found = ((place, _parse(line, place), line) for place, line in lines)
    for place, record, source in found:
        yield place, _checked(record, place, "\\u" in source)


def _parse(text: str, place: str):
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{place} is no JSON ({error}): give one record per line, or one list of records") from error


def _checked(record, place: str, escaped: bool) -> dict:
    if not isinstance(record, dict):
        raise UserError(f'{place} is no record but {json.dumps(record)[:40]}: give an object, such as {{"text": "..."}}')
    if escaped:  # only an escape can stand for half of a character
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise UserError(
                f"{place} holds half a character, {half!a}, which no tokenizer reads: correct or remove it"
            ) from error
    return record


def _parquet_records(file: Path, what: str) -> Iterator[tuple[str, dict]]:
    import pyarrow.parquet

    count = 0
    with _told(file, what), pyarrow.parquet.ParquetFile(file) as table:
        for batch in table.iter_batches():
            for record in batch.to_pylist():
                count += 1
                yield f"{what} {file}, record {count}", record


def _lines(file: Path, what: str) -> Iterator[str]:
    """Yield the file's lines, each with its line feed."""
    with _told(file, what), _open(file, what) as stream:
        for number, raw in enumerate(stream, 1):
            if number == 1:
                _refuse_wide(raw, f"{what} {file}")
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{what} {file}, line {number} is not UTF-8 (byte 0x{raw[error.start]:02x}): convert the file from its "
                    "encoding, which is Latin-1 in `iconv -f LATIN1 -t UTF-8`"
                ) from error
            # Files put together from several have a mark at the beginning of each; a carriage return alone ends a line, too.
            yield from (part.removeprefix("\ufeff") for part in io.StringIO(line, newline=None))


def _refuse_wide(beginning: bytes, place: str) -> None:
    marked = next((name for mark, name in _BYTE_ORDER_MARKS.items() if beginning.startswith(mark)), "")
    if marked or b"\0" in beginning:
        name = marked or "UTF-16 or UTF-32"
        raise UserError(f"{place} is {name}, not UTF-8: convert it, as `iconv -f {name[:6]} -t UTF-8` does")


def _open(file: Path, what: str) -> BinaryIO:
    with file.open("rb") as plain:
        head = plain.read(32)
    for beginning, problem in _ARCHIVES.items():
        if head.startswith(beginning):
            raise UserError(f"{what} {file} {problem}")
    for magic, opened in _DECOMPRESSED.items():
        if head.startswith(magic):
            return opened(file, "rb")
    return file.open("rb")


def _open_zstandard(file: Path, _mode: str) -> BinaryIO:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))


# By content: a suffix may be missing, or left over where a browser has unpacked the file.
_DECOMPRESSED: dict[bytes, Callable] = {
    b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open, b"\x28\xb5\x2f\xfd": _open_zstandard,
}  # fmt: skip


@contextmanager
def _told(file: Path, what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    # pyarrow's errors are ValueErrors; the standard library's readers of compressed files share no base class.
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{what} {file} cannot be read ({' '.join(str(error).split())}): check that the file is whole") from error
