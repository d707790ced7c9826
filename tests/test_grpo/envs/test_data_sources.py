"""Every form that data comes in gives the same rows; errors name file and row, or what to do."""

import bz2
import datetime
import decimal
import gzip
import json
import lzma
import os
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from paths import ROOT

from grpo.envs.data_files import DataError
from grpo.envs.data_sources import read_rows
from grpo.envs.dataset import Dataset

ROWS = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(12)]
CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: other
  data_files: other/*.parquet
---
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()


def make(tokenizer, path, **changes):
    settings = {"prompt_key": "question", "answer_key": "answer", "match": "exact", "current_date": "2025-06-28",
                "reasoning_effort": "low", "max_prompt_tokens": 900, "held_out_fraction": 0.4}
    if changes.keys() & {"eval_path", "eval_split"}:
        settings["held_out_fraction"] = None
    return Dataset(tokenizer=tokenizer, seed=0, path=path, **{**settings, **changes})


def rows_of(path, *, key="env.path", subset=None, split=None):
    return [row for _, row in read_rows(path, key, subset=subset, split=split)]


def places_of(path, *, key="env.path", subset=None, split=None):
    return [place for place, _ in read_rows(path, key, subset=subset, split=split)]


def refusal(path, **choice):
    with pytest.raises(DataError) as caught:
        rows_of(path, **choice)
    return str(caught.value)


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def hub_folder(tmp_path):
    """A folder laid out as a data set of the hub: a card, two subsets, one of them with two splits."""
    folder = tmp_path / "copy"
    parquet(folder / "main" / "train-00000-of-00002.parquet", ROWS[:5])
    parquet(folder / "main" / "train-00001-of-00002.parquet", ROWS[5:9])
    parquet(folder / "main" / "test-00000-of-00001.parquet", ROWS[9:])
    parquet(folder / "other" / "data.parquet", ROWS[:2])
    (folder / "README.md").write_text(CARD)
    return folder


def test_every_form_of_a_file_gives_the_same_rows(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    tabs = "".join("\t".join(row.values()) + "\n" for row in [{"a": "question", "b": "answer"}, *ROWS]).encode()
    table = pa.Table.from_pylist(ROWS)
    contents = {
        "lines.jsonl": lines, "lines.ndjson": lines, "lines.json": lines, "tabs.tsv": tabs,
        "list.json": json.dumps(ROWS).encode(), "list.jsonl": json.dumps(ROWS, indent=1).encode(),
        "commas.csv": tabs.replace(b"\t", b","), "lines.jsonl.gz": gzip.compress(lines),
        "LINES.JSONL": lines, "lines.json.bz2": bz2.compress(lines), "tabs.tsv.xz": lzma.compress(tabs),
        "lines.ndjson.zst": pa.compress(lines, codec="zstd", asbytes=True),
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    parquet(tmp_path / "table.parquet", ROWS)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    names = [*contents, "table.parquet", "stream.arrow", "file.arrow"]
    for name in names:
        assert rows_of(str(tmp_path / name)) == ROWS, name
    assert places_of(str(tmp_path / "table.parquet"))[11] == f"{tmp_path}/table.parquet[11]"
    assert places_of(str(tmp_path / "lines.json"))[11] == f"{tmp_path}/lines.json:12"


def test_folders_of_save_to_disk_are_read_with_and_without_splits(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select(range(2))).save_to_disk(tmp_path / "two")
    datasets.DatasetDict(dev=data.select(range(3))).save_to_disk(tmp_path / "dev")
    datasets.DatasetDict(a=data, b=data).save_to_disk(tmp_path / "ab")
    assert rows_of(str(tmp_path / "one")) == ROWS
    assert rows_of(str(tmp_path / "two")) == ROWS  # train, where nothing is chosen
    assert rows_of(str(tmp_path / "two"), split="test") == ROWS[:2]
    assert rows_of(str(tmp_path / "dev")) == ROWS[:3]  # the only one
    assert places_of(str(tmp_path / "two"), split="test") == [f"{tmp_path}/two/test[0]", f"{tmp_path}/two/test[1]"]
    assert "it has no split 'dev', but train, test; choose with env.split=NAME" in refusal(str(tmp_path / "two"), split="dev")
    message = refusal(str(tmp_path / "ab"), key="prompts")  # of grpo.generate
    assert "ab: it has no split 'train', but a, b; prompts takes no part of a data set: name a file" in message
    assert "set env.split=null" in refusal(str(tmp_path / "one"), split="train")
    assert "set env.subset=null" in refusal(str(tmp_path / "two"), subset="main")


def test_a_folder_as_the_hub_lays_it_out_has_subsets_and_splits(hub_folder):
    assert rows_of(str(hub_folder), subset="main") == ROWS[:9]
    assert rows_of(str(hub_folder), subset="main", split="test") == ROWS[9:]
    assert rows_of(str(hub_folder), subset="main", split="train[:3]") == ROWS[:3]
    assert rows_of(str(hub_folder), subset="other") == ROWS[:2]
    message = refusal(str(hub_folder))
    assert "available configs: ['main', 'other']" in message and "choose with env.subset=NAME" in message
    message = refusal(str(hub_folder), subset="mian")
    assert "Available: ['main', 'other']" in message and "choose with env.subset=NAME" in message
    message = refusal(str(hub_folder), subset="main", split="valid", key="env.eval_path")
    assert "['train', 'test']" in message and "choose with env.eval_split=NAME" in message


def test_training_and_evaluation_take_splits_of_one_data_set(tokenizer, hub_folder):
    env = make(tokenizer, str(hub_folder), subset="main", split="train", eval_split="test")
    assert sorted(row.columns["answer"] for row in env.eval_rows) == ["10", "11", "12"]
    assert len(env.train_rows) == 9
    with pytest.raises(ValueError, match="set exactly one"):
        make(tokenizer, str(hub_folder), subset="main", eval_split="test", held_out_fraction=0.1)


def test_text_files_of_a_folder_keep_their_texts_and_places(tmp_path):
    parts = {"train.jsonl": '{"question": "a", "answer": "2020-01-02"}\n{"question": "b", "question": "c"}\n',
             "test.csv": "question,answer\na,007\nb,NA\n"}
    for name, text in parts.items():
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(text)
    file = tmp_path / "train" / "train.jsonl"
    found = list(read_rows(str(file.parent), "env.path", subset=None, split=None))
    assert found[0] == (f"{file}:1", {"question": "a", "answer": "2020-01-02"})
    assert found[1][0] == f"{file}:2" and "the key 'question' twice" in found[1][1]
    assert [row["answer"] for row in rows_of(str(tmp_path / "test"), split="test")] == ["007", "NA"]


@pytest.mark.parametrize("names", [("a.jsonl", "b.jsonl", "c.csv"), ("train.jsonl", "extra.jsonl")])
def test_no_data_file_of_a_folder_is_passed_over(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text('{"question": "a", "answer": "1"}\n')
    words = refusal(str(tmp_path))
    assert words.startswith(f"{tmp_path / names[-1]}: would be passed over") and "set env.path to the files, or a glob" in words


def test_a_hub_id_is_loaded_by_datasets_and_a_folder_of_that_name_wins(tmp_path, hub_folder, monkeypatch):
    asked = []
    real = datasets.load_dataset

    def fake(name, subset, split):
        asked.append((name, subset, split))
        return real(str(hub_folder), subset, split=split)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.chdir(tmp_path)
    assert rows_of("openai/gsm8k", subset="main", split="test") == ROWS[9:]
    assert places_of("openai/gsm8k", subset="main")[8] == "openai/gsm8k/train[8]"
    assert asked == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", None)]
    datasets.Dataset.from_list(ROWS[:1]).save_to_disk(tmp_path / "openai" / "gsm8k")
    assert rows_of("openai/gsm8k") == ROWS[:1]
    assert len(asked) == 2


def test_without_a_network_the_message_says_how_to_bring_a_hub_data_set(tmp_path):
    code = ("from grpo.envs.data_sources import read_rows\n"
            "list(read_rows('openai/gsm8k', 'env.path', subset='main', split='train'))")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    message = result.stderr[result.stderr.rindex("DataError: ") :]
    assert message.startswith("DataError: openai/gsm8k: env.path cannot be read: ConnectionError")
    assert "datasets.load_dataset('openai/gsm8k', 'main').save_to_disk('FOLDER')" in message
    assert "env.path=FOLDER" in message


def test_globs_lists_and_commas_take_the_files_in_order(tmp_path, monkeypatch):
    for i in (0, 1, 2):
        (tmp_path / f"part-{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[4 * i : 4 * i + 4]))
    parquet(tmp_path / "deep" / "er" / "last.parquet", [{"question": "last?", "answer": 7}])
    monkeypatch.chdir(tmp_path)
    assert rows_of("part-*.jsonl") == ROWS
    assert rows_of(["part-1.jsonl", "part-0.jsonl"]) == ROWS[4:8] + ROWS[:4]
    assert rows_of("part-1.jsonl, part-0.jsonl") == ROWS[4:8] + ROWS[:4]
    assert rows_of("part-[12].jsonl,**/*.parquet") == [*ROWS[4:], {"question": "last?", "answer": 7}]  # mixed types
    assert places_of("part-*.jsonl")[5] == "part-1.jsonl:2"
    (tmp_path / "a,b[1].jsonl").write_text(json.dumps(ROWS[0]))
    assert rows_of("a,b[1].jsonl") == ROWS[:1]
    assert refusal("none-*.jsonl") == "none-*.jsonl: env.path matches no file"


@pytest.mark.parametrize("path", ["", " ", [], [1], [""]])
def test_an_empty_path_is_not_the_current_folder(tokenizer, path):
    with pytest.raises(ValueError, match="^env.path=.*: (expected|give) a file, a? ?folder or"):
        make(tokenizer, path)


def test_numbers_in_single_precision_are_the_decimals_that_were_meant(tmp_path):
    table = pa.table({"question": ["a", "b"], "answer": pa.array([0.1, None], pa.float32())})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "folder")
    for name in ("d.parquet", "folder"):
        assert [row["answer"] for row in rows_of(str(tmp_path / name))] == [0.1, None]


def test_a_column_named_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["1"]), pa.array(["2"])], ["question", "answer", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert "a column is named twice: question, answer, answer" in refusal(str(tmp_path / "d.parquet"))


@pytest.mark.parametrize(
    "last", [{"role": "user", "content": "9"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]
)
def test_the_answer_is_a_turn_of_the_assistants_own(tokenizer, tmp_path, last):
    rows = [{"question": "q", "answer": [{"role": "assistant", "content": "5"}, last]}]
    with pytest.raises(DataError, match="'answer' is messages that do not end with an answer of the assistant"):
        make(tokenizer, str(parquet(tmp_path / "d.parquet", rows)))


def test_what_is_no_data_is_refused_with_what_is_read(tmp_path):
    (tmp_path / "notes.txt").write_text("1 + 1?")
    assert "must end in .jsonl, .ndjson, .json" in refusal(str(tmp_path / "notes.txt"))
    assert "(there is no such file)" in refusal(str(tmp_path / "nothing"))
    assert "gone.parquet: env.path names no file that is there" in refusal(str(tmp_path / "gone.parquet"))
    assert "data/gone.jsonl.gz: env.path names no file" in refusal("data/gone.jsonl.gz")  # a file's name, no hub id
    assert "such as openai/gsm8k; download other addresses first" in refusal("https://example.org/d.jsonl")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 no more")
    assert "Parquet magic bytes not found" in refusal(str(tmp_path / "broken"))
    assert "cannot be read" in refusal("x" * 300 + ".jsonl")
    (tmp_path / "d.jsonl").write_text("")
    assert "set env.subset=null" in refusal(str(tmp_path / "d.jsonl"), subset="main")
    assert "env.eval_split=test" in refusal(str(tmp_path / "d.jsonl"), split="test", key="env.eval_path")
    with pytest.raises(ValueError, match="env.path=\\[3\\]"):
        rows_of([3])


# --- rows of tables --------------------------------------------------------------------------------------------------


def test_messages_lose_the_nulls_that_a_table_fills_in(tokenizer, tmp_path):
    call = {"type": "function", "function": {"name": "look", "arguments": {"city": "SF"}}}
    conversation = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
                    {"role": "tool", "content": "20"}]
    row = {"prompt": conversation, "answer": "20", "extra_info": {"index": 1, "split": None}}
    other = {**row, "prompt": [{"role": "user", "content": "And tomorrow?"}]}
    path = parquet(tmp_path / "d.parquet", [row, other])
    assert rows_of(str(path)) == [row, other]
    lines = tmp_path / "d.jsonl"
    lines.write_text(json.dumps(row) + "\n" + json.dumps(other))
    eval_path = str(parquet(tmp_path / "eval.parquet", [{**row, "prompt": [{"role": "user", "content": "Now?"}]}]))
    ids = [
        [list(row.token_ids) for row in make(tokenizer, str(file), prompt_key="prompt", eval_path=eval_path).train_rows]
        for file in (lines, path)
    ]
    assert ids[0] == ids[1] and len(ids[0]) == 2


def test_a_prompt_is_the_same_in_a_file_with_nulls_and_in_a_table(tokenizer, tmp_path):
    lines = tmp_path / "d.jsonl"
    message = {"role": "user", "content": "1 + 1?", "name": None, "tool_calls": None}
    lines.write_text(json.dumps({"question": [message], "answer": "2"}))
    table = parquet(tmp_path / "d.parquet", [{"question": [message], "answer": "2"}])
    with pytest.raises(DataError, match=r"d.jsonl:1: the prompt is also an evaluation row, .*d.parquet\[0\]"):
        make(tokenizer, str(lines), eval_path=str(table))


def test_verl_rows_are_taken_as_they_come(tokenizer, tmp_path):
    rows = [{"data_source": "openai/gsm8k", "prompt": [{"role": "user", "content": f"{n}+1?"}], "ability": "math",
             "reward_model": {"style": "rule", "ground_truth": str(n + 1)}, "extra_info": {"split": "train", "index": n}}
            for n in range(8)]
    env = make(tokenizer, str(parquet(tmp_path / "train.parquet", rows)), prompt_key="prompt",
               answer_key="reward_model.ground_truth", match="numeric")
    prompt = env.prompts(0, num_prompts=1)[0]
    source = prompt.row.pop("_source")
    index = prompt.row["extra_info"]["index"]
    assert prompt.row == rows[index] and source == f"{tmp_path}/train.parquet[{index}]"
    assert env._rows[source].answer == str(index + 1)


@pytest.mark.parametrize(
    ("keys", "shape"),
    [
        ({"prompt_key": "prompt", "answer_key": "completion"}, lambda q, a: {"prompt": q, "completion": f" {a}"}),
        ({"prompt_key": "prompt", "answer_key": "completion"},
         lambda q, a: {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}),
        ({"prompt_key": "messages", "answer_key": "messages"},
         lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}),
    ],
)
@pytest.mark.parametrize("write", ["parquet", "jsonl"])
def test_trl_rows_give_the_prompt_and_the_last_assistant_turn_as_the_answer(tokenizer, tmp_path, keys, shape, write):
    rows = [shape(row["question"], row["answer"]) for row in ROWS]
    path = tmp_path / f"d.{write}"
    if write == "parquet":
        parquet(path, rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = make(tokenizer, str(path), match="numeric", **keys)
    expected = {row["question"]: row["answer"] for row in ROWS}
    assert {row.question: row.answer for row in env._rows.values()} == expected
    for row in env._rows.values():
        text = tokenizer.decode(row.token_ids, keep_special=True)
        assert text.endswith(f"<|start|>user<|message|>{row.question}<|end|><|start|>assistant")


def test_messages_that_end_with_the_assistant_need_to_be_the_answer_too(tokenizer, tmp_path):
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}]
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": turns, "answer": "1"}))
    with pytest.raises(DataError, match="ends with a message of the assistant.*set env.answer_key to this column too"):
        make(tokenizer, str(path), prompt_key="messages")
    path.write_text(json.dumps({"messages": turns[:1]}))
    with pytest.raises(DataError, match="'messages' is prompt and answer at once .*the last is the assistant's"):
        make(tokenizer, str(path), prompt_key="messages", answer_key="messages")


def test_dates_bytes_and_images_are_refused_only_where_they_are_used(tokenizer, tmp_path):
    from PIL import Image

    extra = {"day": datetime.date(2025, 1, 2), "blob": b"\x00", "at": datetime.datetime(2025, 1, 2, 3), "gone": float("nan"),
             "price": decimal.Decimal("1.50"), "tags": {"a": 1}}
    data = datasets.Dataset.from_list([{**row, **extra, "image": Image.new("RGB", (2, 2))} for row in ROWS])
    data.to_parquet(tmp_path / "d.parquet")
    env = make(tokenizer, str(tmp_path / "d.parquet"))
    assert env.fingerprint() == make(tokenizer, str(tmp_path / "d.parquet")).fingerprint()
    row = env.train_rows[0].columns
    assert {name: row[name] for name in extra if name != "gone"} == {k: v for k, v in extra.items() if k != "gone"}
    assert isinstance(row["image"]["bytes"], bytes)
    for name, word in (("day", "date"), ("blob", "bytes"), ("image", "dict"), ("at", "datetime"), ("tags", "dict")):
        with pytest.raises(DataError, match=rf"d.parquet\[0\]: '{name}' is a {word}; expected text"):
            make(tokenizer, str(tmp_path / "d.parquet"), answer_key=name)
        with pytest.raises(DataError, match=rf"d.parquet\[0\]: '{name}' is a {word}; a template takes"):
            make(tokenizer, str(tmp_path / "d.parquet"), question_template=f"{{question}} {{{name}}}")
    with pytest.raises(DataError, match="'gone' is null"):
        make(tokenizer, str(tmp_path / "d.parquet"), answer_key="gone")
    assert make(tokenizer, str(tmp_path / "d.parquet"), answer_key="price").train_rows[0].answer == "1.50"


def test_columns_of_mixed_types_dictionaries_and_maps_become_plain_python(tmp_path):
    mixed = [{"x": 1, "y": {"a": [1, "b"]}}, {"x": "s", "y": {"a": None}}]
    datasets.Dataset.from_list(mixed, on_mixed_types="use_json").to_parquet(tmp_path / "mixed.parquet")
    assert rows_of(str(tmp_path / "mixed.parquet")) == mixed
    table = pa.table({"m": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
                      "c": pa.array(["x"]).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "odd.parquet")
    assert rows_of(str(tmp_path / "odd.parquet")) == [{"m": {"a": 1}, "c": "x"}]
