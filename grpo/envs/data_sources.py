"""Where the rows of a data set come from: files, globs, lists of them, folders and the Hugging Face hub.

Text files are read here (grpo/envs/data_files.py), since their errors shall name the line; Parquet, Arrow, the folders of
`save_to_disk` and data sets of the hub are read by `datasets`, and a row of theirs is named by its index: train.parquet[7],
openai/gsm8k/train[7]. Images and audio stay bytes. Nothing is streamed: a run needs to know its rows when it starts.
"""

import glob
import re
from collections.abc import Iterator
from pathlib import Path

from grpo.envs.data_files import COMPRESSIONS, TEXT_FORMATS, DataError, check_exists, read_text_rows, text_format

TABLES = (".parquet", ".arrow", ".feather")
CONVERSIONS = {".xlsx": "read_excel", ".xls": "read_excel", ".ods": "read_excel", ".pkl": "read_pickle",
               ".pickle": "read_pickle", ".orc": "read_orc", ".xml": "read_xml", ".h5": "read_hdf", ".dta": "read_stata"}


def read_rows(path: str | list, key: str, *, subset: str | None, split: str | None) -> Iterator[tuple[str, dict | str]]:
    """(place, columns) for every row, or the problem as text in place of the columns. Raises DataError for what cannot be
    read at all. `key` is the config key that named the path, such as env.path; `subset` and `split` choose within folders and
    hub ids."""
    for location in locations(path, key):
        if isinstance(location, Path) and location.is_file() and (subset or split):
            option, value = ("env.subset", subset) if subset else (_split_option(key), split)
            raise DataError(f"{location}: {option}={value} chooses a part of a hub id or of a folder, and this is a file; "
                            f"set {option}=null")
        if isinstance(location, str):
            yield from _load(location, key, subset, split)
        elif location.is_dir():
            yield from _read_folder(location, key, subset, split)
        elif text_format(location) is not None:
            yield from read_text_rows(location, key)
        else:
            yield from _read_table(location, key)


def locations(path: str | list, key: str) -> list[Path | str]:
    """What `path` names, in order: files and folders as Path, ids of the hub as text. It may be a list, a text with commas, a
    glob."""
    if isinstance(path, list):
        if not path or not all(isinstance(part, str) for part in path):
            raise ValueError(f"{key}={path!r}: expected a file, folder or hub id, or a list of them")
        return [found for part in path for found in locations(part, key)]
    if not path.strip() or "://" in path:
        raise DataError(f"{key}={path!r}: give a file, a folder or the id of a data set of the hub, such as openai/gsm8k; "
                        "download other addresses first")
    try:
        place = Path(path).expanduser()
        if place.exists():
            return [place]
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a zero byte, a home that nobody has
        raise DataError(f"{path[:200]}: {key} cannot be read: {error}") from error
    if "," in path:
        return locations([part.strip() for part in path.split(",") if part.strip()], key)
    if glob.has_magic(path):
        found = sorted(glob.glob(str(place), recursive=True))
        if not found:
            raise DataError(f"{path}: {key} matches no file")
        return [Path(name) for name in found]
    is_file_name = text_format(place) is not None or place.suffix in (*TABLES, *COMPRESSIONS, *CONVERSIONS)
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None
    return [path] if is_hub_id and not is_file_name else [place]


def _read_table(path: Path, key: str) -> Iterator[tuple[str, dict]]:
    if path.suffix.lower() not in TABLES:
        convert = CONVERSIONS.get(path.suffix)
        advice = "" if convert is None else (
            f'; convert it, e.g. python -c "import pandas; pandas.{convert}(\'{path}\').to_parquet(\'{path.stem}.parquet\')"')
        missing = "" if path.exists() else " (there is no such file)"
        raise DataError(f"{path}: {key} must end in {', '.join((*TEXT_FORMATS, *TABLES))}, the first "
                        f"{len(TEXT_FORMATS)} also with {', '.join(COMPRESSIONS)}, or be a folder or a hub id such as "
                        f"openai/gsm8k{missing}{advice}")
    check_exists(path, key)
    import datasets
    import pyarrow.parquet

    try:
        if path.suffix.lower() == ".parquet":
            table = pyarrow.parquet.ParquetFile(path).read()
        else:
            with pyarrow.memory_map(str(path)) as file:
                is_file = file.read(6) == b"ARROW1"
                file.seek(0)
                table = (pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)).read_all()
        if len(set(table.column_names)) < len(table.column_names):
            raise ValueError(f"a column is named twice: {', '.join(table.column_names)}")
        # what `datasets` wrote says in its schema how columns of mixed types are stored
        is_plain = b"huggingface" not in (table.schema.metadata or {})
        rows = table.to_pylist(maps_as_pydicts="lossy") if is_plain else datasets.Dataset(table).to_list()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: {key} cannot be read: {type(error).__name__}: {error}") from error
    yield from _named(rows, str(path), table.schema)


def _read_folder(path: Path, key: str, subset: str | None, split: str | None) -> Iterator[tuple[str, dict]]:
    import datasets

    if not any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        files = _text_files(path, key, subset)
        chosen = files.get(split or (next(iter(files)) if len(files) == 1 else "train"))
        if chosen is None:
            yield from _load(str(path), key, subset, split)
        else:
            for file in chosen:
                yield from read_text_rows(file, key)
        return
    if subset is not None:
        raise DataError(f"{path}: env.subset={subset}: a folder of save_to_disk has no subsets; set env.subset=null")
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: {key} cannot be read: {type(error).__name__}: {error}") from error
    if split is not None and isinstance(found, datasets.Dataset):
        option = _split_option(key)
        raise DataError(f"{path}: {option}={split}: the folder holds one data set without splits; set {option}=null")
    yield from _split_of(found, str(path), key, split)


def _text_files(path: Path, key: str, subset: str | None) -> dict[str, list[Path]]:
    """The splits of a folder of text files; `datasets` would make dates and numbers of their texts. {} for other folders.

    Raises DataError for a data file of a folder without a card that would be passed over."""
    import datasets

    try:
        found = datasets.load_dataset_builder(str(path), subset).config.data_files or {}
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError):
        return {}  # _load says what is wrong
    files = {str(split): [Path(name) for name in names] for split, names in found.items()}
    read = {file.resolve() for names in files.values() for file in names}
    if read and not (path / "README.md").exists():
        for file in sorted(path.rglob("*")):
            is_data = (text_format(file) is not None or file.suffix in TABLES) and file.name != "dataset_infos.json"
            if is_data and file.resolve() not in read and not any(p[0] in "._" for p in file.relative_to(path).parts):
                raise DataError(f"{file}: would be passed over beside {sorted(read)[0].name}, as a folder is read in one "
                                f"format and in splits by file names; set {key} to the files, or a glob")
    return files if all(text_format(file) is not None for file in read) else {}


def _load(name: str, key: str, subset: str | None, split: str | None) -> Iterator[tuple[str, dict]]:
    import datasets

    try:
        found = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = f": {error.__cause__}" if error.__cause__ is not None and "enerating" in str(error) else ""
        text = " ".join(line.strip() for line in f"{error}{cause}".splitlines() if line.strip())
        if "Config name is missing" in text or "BuilderConfig" in text:
            advice = _how_to_choose(key, "env.subset")
        elif "plit" in text and isinstance(error, ValueError):
            advice = _how_to_choose(key, _split_option(key))
        elif Path(name).is_dir():
            advice = ""
        else:
            advice = ("\nThere is no such file or folder here, so it was taken for a data set of the hub. Check the spelling "
                      "and, for a private one, HF_TOKEN. Without a network it must be in the cache; or, where there is one, "
                      f"python -c \"import datasets; datasets.load_dataset('{name}', {subset!r}).save_to_disk('FOLDER')\", and "
                      f"{key}=FOLDER here{' (with env.subset=null)' if subset else ''}")
        raise DataError(f"{name}: {key} cannot be read: {type(error).__name__}: {text}{advice}") from error
    yield from _split_of(found, name, key, split)


def _split_of(found, name: str, key: str, split: str | None) -> Iterator[tuple[str, dict]]:
    """The rows of a data set, which is that split, or of the chosen one of several: without a choice the only one, or `train`."""
    import datasets

    if isinstance(found, datasets.DatasetDict):
        if split is None:
            split = next(iter(found)) if len(found) == 1 else "train"
        if split not in found:
            advice = _how_to_choose(key, _split_option(key))
            raise DataError(f"{name}: it has no split {split!r}, but {', '.join(found)}{advice}")
        found = found[split]
    yield from _named(found.to_list(), f"{name}/{split}" if split else name, found.features.arrow_schema)


def _split_option(key: str) -> str:
    return "env.eval_split" if key == "env.eval_path" else "env.split"


def _how_to_choose(key: str, option: str) -> str:
    """What the end of a message advises where a part must be chosen; `prompts` of grpo.generate has no key for it."""
    return f"; choose with {option}=NAME" if key.startswith("env.") else f"; {key} takes no part of a data set: name a file"


def _named(rows: list[dict], place: str, schema) -> Iterator[tuple[str, dict]]:
    """The rows with their places. Floats of fewer than 64 bits become the shortest decimal that they are, 0.1."""
    narrow = {field.name: field.type.to_pandas_dtype() for field in schema if str(field.type) in ("halffloat", "float")}
    for i, row in enumerate(rows):
        # a column that is one struct keeps its nulls
        columns = {name: _without_nulls(value) if isinstance(value, list) else value for name, value in row.items()}
        short = {name: float(str(kind(columns[name]))) for name, kind in narrow.items() if columns[name] is not None}
        yield f"{place}[{i}]", columns | short


def _without_nulls(value: object) -> object:
    """A list without the null keys that a table gives to its messages and tools: each gets the keys of all the others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
