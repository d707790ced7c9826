"""Files of JSON lines, one record a line in the order of their `step`, which a run appends to, cuts on resume and reads back.

A person or a tool may add lines, and a kill may cut one short: lines that are no records are passed over and stay in the file.
NaN and infinities are written as null, because JSON has no name for them.
"""

import itertools
import json
import math
import os
from pathlib import Path

from models.formats.atomic import new_file


def json_safe(value: object) -> object:
    """Returns a copy that JSON can hold: non-finite numbers become None, unknown objects their text."""
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def parse_record(line: bytes) -> dict | None:
    """The record of a line, a JSON object with a whole number as `step`; None for any other line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, numbers of thousands of digits, nested without end
        return None
    is_record = isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**63
    return row if is_record else None


def read_records(path: Path) -> list[dict]:
    """The records of a file in their order ([] when there is none), without a last line that was cut short."""
    if not path.exists():
        return []
    rows = (parse_record(line) for line in path.read_bytes().split(b"\n")[:-1])
    return [row for row in rows if row is not None]


class JsonlFile:
    """A file of records that is open for appending; each line is on its way to the disk when `append` returns."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None

    def append(self, rows: list[dict]) -> None:
        lines = [json.dumps(json_safe(row), allow_nan=False, ensure_ascii=False) + "\n" for row in rows]
        data = "".join(lines).encode("utf-8", "backslashreplace")  # a lone surrogate becomes its JSON escape
        descriptor = self._open()
        end = os.fstat(descriptor).st_size
        if end > 0 and os.pread(descriptor, 1, end - 1) != b"\n":  # a line of others must not swallow ours
            data = b"\n" + data
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        except OSError as error:
            hint = "free space, then go on with resume=true"
            raise OSError(error.errno, f"cannot write ({error.strerror}): {hint}", str(self.path)) from error

    def truncate_after(self, step: int) -> None:
        """Moves the records of later steps, and a last line that a kill cut short, into a new file `NAME.cut-N` beside it."""
        if not self.path.exists():
            return
        self.close()
        with self.path.open("rb") as file:
            lines = file.readlines()
        records = map(parse_record, lines)
        is_cut = [not line.endswith(b"\n") or (record is not None and record["step"] > step)
                  for line, record in zip(lines, records)]
        if not any(is_cut):
            return
        beside = next(path for path in (Path(f"{self.path}.cut-{number}") for number in itertools.count(1))
                      if not os.path.lexists(path))
        beside.write_bytes(b"".join(itertools.compress(lines, is_cut)))
        first = is_cut.index(True)
        if all(is_cut[first:]):
            os.truncate(self.path, sum(map(len, lines[:first])))
        else:
            with new_file(self.path.resolve()) as partial:
                partial.write_bytes(b"".join(line for line, cut in zip(lines, is_cut) if not cut))

    def sync(self) -> None:
        os.fsync(self._open())

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        if self._descriptor is not None and self._was_replaced():
            self.close()
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        return self._descriptor

    def _was_replaced(self) -> bool:
        """Whether an editor put another file in the place of the open one, or somebody deleted it."""
        try:
            return not os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except OSError:
            return self.path.parent.is_dir()  # a folder that was moved away has the open file
