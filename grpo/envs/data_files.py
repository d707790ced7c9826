"""Rows of JSONL, JSON-list and CSV files, plain or gzipped, in UTF-8, each with the place it stands at."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

FORMATS = (".jsonl", ".json", ".csv")


class DataError(ValueError):
    """A data file that cannot be used; the message starts with the file and line."""


def read_records(path: Path, key: str) -> Iterator[tuple[str, dict | str]]:
    """("file:line", columns) for every row, or the problem as text in place of the columns. Raises DataError for a file
    that cannot be read at all; `key` is the config key that named it."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in FORMATS:
        raise DataError(f"{path}: env.{key} must end in {', '.join(FORMATS)}, or one of them and .gz")
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: env.{key} cannot be read: {type(error).__name__}: {error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte {data[error.start]:#04x} is not UTF-8 ({error.reason}); convert the file, e.g. "
            "iconv -f latin1 -t utf-8"
        ) from error
    del data
    if suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}:{number}", _parse_line(line)
    elif suffix == ".json":
        yield from _read_json_list(text, path)
    else:
        yield from _read_csv(text, path)


def _parse_json(text: str) -> object:
    def refuse(name: str):
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


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
        records = _parse_json(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(records, list):
        raise DataError(
            f"{path}: expected a JSON list of objects, found a {type(records).__name__}; one object per line is .jsonl"
        )
    for i, record in enumerate(records):
        is_object = isinstance(record, dict)
        yield f"{path}[{i}]", record if is_object else f"expected a JSON object, found a {type(record).__name__}"


def _read_csv(text: str, path: Path) -> Iterator[tuple[str, dict | str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            source, line = f"{path}:{line}", reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = fields
                if len(set(header)) < len(header):
                    raise DataError(f"{source}: the header names a column twice: {', '.join(header)}")
            elif len(fields) != len(header):
                yield source, f"{len(fields)} fields where the header has {len(header)}"
            else:
                yield source, dict(zip(header, fields))
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not valid CSV: {error}") from error
