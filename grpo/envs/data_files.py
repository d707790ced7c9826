"""Rows of text files, each with its file and line: JSON lines, a JSON list, CSV or TSV, plain or compressed, in UTF-8."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


class DataError(ValueError):
    """Data that cannot be used; the message starts with its place, such as file:line. Characters of the data that a terminal
    would act on are shown as escapes."""

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message))


def text_format(path: Path) -> str | None:
    """The format that the file's name ends in, its compression aside; None if it is none of TEXT_FORMATS."""
    name = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return name.suffix.lower() if name.suffix.lower() in TEXT_FORMATS else None


def check_exists(path: Path, key: str) -> None:
    if not path.exists():
        raise DataError(f"{path}: {key} names no file that is there; a relative path starts at {Path.cwd()}")


def read_text_rows(path: Path, key: str) -> Iterator[tuple[str, dict | str]]:
    """("file:line", columns) for every row, or the problem as text in place of the columns. Raises DataError for a file
    that cannot be read at all; `key` is the config key that named it."""
    check_exists(path, key)
    try:
        data = _decompressed(path)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: {key} cannot be read: {type(error).__name__}: {error}") from error
    text = _decoded(data, path)
    del data
    kind, first = text_format(path), text[:1000].lstrip()[:1]
    if kind in (".csv", ".tsv"):
        yield from _read_csv(text, path, "," if kind == ".csv" else "\t")
    elif first == "[":
        yield from _read_json_list(text, path)
    else:
        if kind == ".json":
            _refuse_one_object(text, path)
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}:{number}", _parse_line(line)


def _decompressed(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".zst":  # in the standard library from Python 3.14 on
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()
    unpack: dict[str, Callable] = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
    return unpack[path.suffix](data) if path.suffix in unpack else data


def _decoded(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise DataError(f"{path}:{line}: byte {data[error.start]:#04x} is not UTF-8 ({error.reason}); convert the file, e.g. "
                        f"iconv -f {encoding} -t utf-8") from error


def _parse_json(text: str) -> object:
    def refuse(name: str):
        raise ValueError(f"{name} is not JSON")

    def unique(pairs: list[tuple[str, object]]) -> dict:
        record = dict(pairs)
        if len(record) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"an object has the key {twice[:60]!r} twice; only one of its values could be used")
        return record

    return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)


def _parse_line(line: str) -> dict | str:
    try:
        record = _parse_json(line)
    except json.JSONDecodeError as error:
        return f"not valid JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return f"not valid JSON: {error}"
    return record if isinstance(record, dict) else f"expected a JSON object, found a {type(record).__name__}"


def _read_json_list(text: str, path: Path) -> Iterator[tuple[str, dict | str]]:
    try:
        records = _parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise DataError(_after_the_list(text, path, error)) from error
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    for i, record in enumerate(records):
        is_object = isinstance(record, dict)
        yield f"{path}[{i}]", record if is_object else f"expected a JSON object, found a {type(record).__name__}"


def _after_the_list(text: str, path: Path, error: json.JSONDecodeError) -> str:
    """What a file is that starts with a JSON list and goes on after it."""
    wanted = "expected one JSON object a line, such as {\"question\": \"1+1\", \"answer\": \"2\"}, or one list of such objects"
    end = text[:error.pos].rstrip()
    if "\n" in end.lstrip():
        return f"{path}:{error.lineno}: more follows after the end of the JSON list in line {end.count(chr(10)) + 1}; {wanted}"
    first = _parse_json(end)
    hint = f": jq -c '.[]' {path.name} > rows.jsonl" if first and all(isinstance(item, dict) for item in first) else ""
    return f"{path}:{end.count(chr(10)) + 1}: this line is a JSON list, and others follow; {wanted}{hint}"


def _refuse_one_object(text: str, path: Path) -> None:
    """Raises DataError where a .json file is one object, not one per line."""
    try:
        record = _parse_json(text)
    except (ValueError, RecursionError):
        return  # one object per line, or lines that will be named
    advice = "one object per line is read too"
    if isinstance(record, dict):
        lists = [name for name, value in record.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if not lists and "\n" not in text.strip() and not all(isinstance(value, (dict, list)) for value in record.values()):
            return  # the only line
        advice = (f"if its rows are those of {lists[0]!r}: jq -c '.[\"{lists[0]}\"][]' {path.name} > rows.jsonl" if lists else
                  f"if it is a table by columns: python -c \"import pandas; pandas.read_json('{path.name}').to_json("
                  "'rows.jsonl', orient='records', lines=True)\"")
    raise DataError(f"{path}: expected a JSON list of objects, found a {type(record).__name__}; {advice}")


def _read_csv(text: str, path: Path, delimiter: str) -> Iterator[tuple[str, dict | str]]:
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    rows, line = [], 1
    try:
        for fields in reader:
            rows.append((f"{path}:{line}", fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not valid {path.suffixes[0][1:].upper()}: {error}") from error
    finally:
        csv.field_size_limit(limit)  # one for the whole process
    rows = [(source, fields) for source, fields in rows if fields]
    if not rows:
        return
    source, header = rows[0]
    if len(set(header)) < len(header):
        raise DataError(f"{source}: the header names a column twice: {', '.join(header)}")
    others = [mark for mark in ",;\t|" if mark in header[0]] if len(header) == 1 else []
    if others:
        raise DataError(f"{source}: the header is one column, {header[0]!r}; its fields seem to be separated by {others[0]!r}: "
                        "tabs are read from a .tsv, commas from a .csv")
    for source, fields in rows[1:]:
        fits = len(fields) == len(header)
        yield source, dict(zip(header, fields)) if fits else f"{len(fields)} fields where the header has {len(header)}"
