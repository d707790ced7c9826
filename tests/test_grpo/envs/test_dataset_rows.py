"""Rows of a data set: what is wrong with one is named by its place, left out or refused; so are keywords."""

import csv
import gzip
import json

import pytest
from question_data import ARITHMETIC, GOOD, make, problem, rows, write

from grpo.envs.carry import build_tokenizer


def test_every_format_reads_the_same_rows(tokenizer, tmp_path):
    records = [{"question": f'Say "{n}", please\nnow', "answer": f"é{n}"} for n in range(12)]
    with open(tmp_path / "d.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(records)
    (tmp_path / "d.json").write_text(json.dumps(records))
    (tmp_path / "d.jsonl").write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8")
    for name in ("d.csv", "d.json", "d.jsonl"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for name in ("d.csv", "d.json", "d.jsonl", "d.csv.gz", "d.json.gz", "d.jsonl.gz"):
        env = make(tokenizer, path=str(tmp_path / name), match="exact")
        found = [p.row for p in env.prompts(0, num_prompts=len(env.train_rows))] + [p.row for p in env.eval_prompts()]
        assert sorted((row["question"], row["answer"]) for row in found) == sorted(
            (r["question"], r["answer"]) for r in records
        )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "a", "answer": ', "not valid JSON: Expecting value at column"),
        ("[1, 2]", "expected a JSON object, found a list"),
        ('{"question": "a"}', "no column 'answer' (env.answer_key)"),
        ('{"question": null, "answer": 1}', "'question' is null"),
        ('{"question": " ", "answer": 1}', "the prompt is empty"),
        ('{"question": "b", "answer": ""}', "'answer' is empty"),
        ('{"question": "b", "answer": "x"}', "'x', which is not a number (env.match=numeric)"),
        ('{"question": "b", "answer": NaN}', "NaN is not JSON"),
        ('{"question": "b", "answer": true}', "'answer' is a bool"),
        ('{"question": "\\ud800", "answer": 1}', "messages[0] cannot be encoded: the user message's content holds half of a"),
        ('{"question": 7, "answer": 1}', "the prompt is a int"),
        ('{"question": [{"role": "user"}], "answer": 1}', "messages[0].content (role user) must be a string, got None"),
        ('{"question": [{"role": "boss", "content": "x"}], "answer": 1}', "messages[0] has role 'boss'; allowed: system,"),
        ('{"question": [{"role": "assistant", "content": "x"}], "answer": 1}', "ends with a message of the assistant"),
        ('{"question": [], "answer": 1}', "messages is empty"),
        ("[" * 100_000, "not valid JSON"),
        ('{"question": "b", "answer": 1' + "0" * 5000 + "}", "not valid JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tokenizer, tmp_path, line, words):
    path = write(tmp_path, [GOOD, "", line])
    message = problem(tokenizer, path)
    assert message.startswith(f"{path}:3: ")
    assert words in message
    assert "1 bad of 2 rows" in message


def test_all_bad_rows_are_counted_and_the_first_five_shown(tokenizer, tmp_path):
    path = write(tmp_path, [GOOD] + ["nonsense"] * 7)
    message = problem(tokenizer, path)
    assert "7 bad of 8 rows" in message and "columns: question, answer" in message
    assert [f"{path}:{n}: " in message for n in range(1, 9)] == [False, True, True, True, True, True, False, False]


def test_columns_that_no_row_has_are_one_line_with_the_keys_to_set(tokenizer, tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("".join(["prompt,label\n", *(f"What is {n} + 1?,{n + 1}\n" for n in range(9))]))
    message = problem(tokenizer, path)
    assert message == (
        f"{path}: no row has a column 'question' (env.prompt_key) and 'answer' (env.answer_key); columns: prompt, label; "
        "set env.prompt_key=prompt env.answer_key=label"
    )
    assert len(make(tokenizer, path=str(path), prompt_key="prompt", answer_key="label")._rows) == 9


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"problem": "1+1?", "solution": "2", "level": 3}, "set env.prompt_key=problem env.answer_key=solution"),
        (
            {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"style": "rule", "ground_truth": "2"}},
            "columns: prompt, reward_model, reward_model.style, reward_model.ground_truth; set env.prompt_key=prompt "
            "env.answer_key=reward_model.ground_truth",
        ),
        ({"question": "1+1?", "Target": "2"}, "no row has a column 'answer' (env.answer_key); columns: question, Target; "
                                              "set env.answer_key=Target"),
        ({"a": "1+1?", "b": "2"}, "set env.prompt_key=COLUMN env.answer_key=COLUMN"),
    ],
)
def test_the_suggestion_names_columns_there_are(tokenizer, tmp_path, row, advice):
    message = problem(tokenizer, write(tmp_path, [row] * 3))
    assert advice in message and "\n" not in message


def test_a_missing_column_of_some_rows_is_named_row_by_row(tokenizer, tmp_path):
    path = write(tmp_path, [*rows(3), {"question": "x?", "label": 1}])
    message = problem(tokenizer, path)
    assert message.startswith(f"{path}:4: no column 'answer' (env.answer_key)")
    assert "columns: question, answer, label" in message


def test_the_share_of_bad_rows_that_may_be_skipped_is_a_key(tokenizer, tmp_path):
    assert len(make(tokenizer, path=write(tmp_path, [*rows(199), "{"]), on_bad_row="skip")._rows) == 199
    path = write(tmp_path, [*rows(116), *["{"] * 4])  # 3.3 % of 120
    message = problem(tokenizer, path, on_bad_row="skip")
    assert "env.max_bad_rows=0.01 of them may be skipped, and these are 0.0333" in message
    assert "set env.on_bad_row=skip env.max_bad_rows=0.04" in problem(tokenizer, path)
    assert len(make(tokenizer, path=path, on_bad_row="skip", max_bad_rows=0.04)._rows) == 116


def test_rows_left_out_are_counted_in_the_summary(tokenizer, tmp_path):
    path = write(tmp_path, [*rows(40), *rows(2), "{", {"question": "x" * 900, "answer": 1}, {"question": "y" * 901, "answer": 1}])
    eval_path = write(tmp_path, rows(5, start=37), "eval.jsonl")
    skip = dict.fromkeys(("on_bad_row", "on_long_prompt", "on_duplicate", "on_overlap"), "skip")
    env = make(tokenizer, path=path, eval_path=eval_path, max_bad_rows=0.1, **skip)
    assert env.summary() == (
        "37 training and 5 evaluation rows (left out: 2 repeated, 1 bad, 2 too long, 3 of the evaluation)"
    )
    assert make(tokenizer).summary().endswith("evaluation rows")


def test_escape_sequences_of_the_data_reach_no_terminal(tokenizer, tmp_path):
    path = write(tmp_path, [{"que\x1b[31mstion": "1?", "a\nb": 2, "c\x9bd": 1, "e\u202ef": 1}] * 2)
    message = problem(tokenizer, path)
    assert "'que\\x1b[31mstion', 'a\\nb', 'c\\x9bd', 'e\\u202ef'" in message and message.isprintable()
    path = write(tmp_path, [{"question": "1?", "answer": 1, "\x1b]0;title\x07": 1}, {"question": "2?"}])
    assert "\x1b" not in problem(tokenizer, path)


def test_a_long_list_of_columns_is_cut(tokenizer, tmp_path):
    message = problem(tokenizer, write(tmp_path, [{f"{'c' * 100}{n}": 1 for n in range(500)}]))
    assert "and 480 more" in message and len(message) < 3000


def test_half_a_surrogate_in_an_answer_is_named_by_file_and_line(tokenizer, tmp_path):
    path = write(tmp_path, [*rows(3), '{"question": "b?", "answer": "x\\ud800"}'])
    for match in ("exact", "numeric"):
        message = problem(tokenizer, path, match=match)
        assert message.startswith(f"{path}:4: 'answer' holds half of a surrogate pair") and message.isascii()


def test_a_key_written_twice_in_an_object_is_a_bad_row(tokenizer, tmp_path):
    path = write(tmp_path, [*rows(3), '{"question": "b?", "answer": 1, "answer": 2}'])
    assert problem(tokenizer, path).startswith(f"{path}:4: not valid JSON: an object has the key 'answer' twice")
    nested = write(tmp_path, [*rows(3), '{"question": "b?", "answer": 1, "x": [{"y": 1, "y": 1}]}'], "n.jsonl")
    assert problem(tokenizer, nested).startswith(f"{nested}:4: not valid JSON: an object has the key 'y' twice")


def test_csv_fields_of_any_length_are_read(tokenizer, tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "d.csv").write_text("question,answer,context\n" + "".join(f"{n}?,{n},{'x' * 200_000}\n" for n in range(8)))
    env = make(tokenizer, path=str(tmp_path / "d.csv"))
    assert {len(prompt.row["context"]) for prompt in env.prompts(0, num_prompts=8)} == {200_000}
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("d.jsonl", b"", "holds no rows; env.path needs at least one"),
        ("d.jsonl", b"\n \n", "holds no rows"),
        ("d.json", b"[]", "holds no rows"),
        ("d.json", b"", "holds no rows"),
        ("d.csv", b"question,answer\n", "holds no rows"),
        (
            "d.jsonl",
            b'{"question": "a", "answer": 1}\n{"question": "\xe9", "answer": 1}\n',
            ":2: byte 0xe9 is not UTF-8",
        ),
        ("d.csv", b"question,answer\na,1\nb,1,2\n", ":3: 3 fields where the header has 2"),
        ("d.csv", b'question,answer\n"a\nb",1\nc\n', ":4: 1 fields where the header has 2"),
        ("d.csv", b"question,question\na,1\n", ":1: the header names a column twice"),
        ("d.csv", b'question,answer\n"a,1\n', ":2: not valid CSV"),
        ("d.json", b'{"data": [{"question": "a"}]}', "found a dict; if its rows are those of 'data': jq -c"),
        ("d.json", b'{"question": ["a"],\n"answer": ["1"]}', "if it is a table by columns: python -c"),
        ("d.csv", b"question;answer\na;1\n", ":1: the header is one column, 'question;answer'; its fields seem to be"),
        ("d.csv", "question,answer\na,1\n".encode("utf-16"), "iconv -f utf-16 -t utf-8"),
        ("d.jsonl.xz", b"not xz", "LZMAError"),
        ("d.jsonl.zst", b"not zst", "ZSTD decompress failed"),
        ("d.jsonl.bz2", b"not bz2", "env.path cannot be read: OSError"),
        ("d.json", b'[{"question": "a", "answer": 1},\n{]', ":2: not valid JSON"),
        ("d.jsonl", b'["a", 1]\n["b", 2]\n', ":1: this line is a JSON list, and others follow; expected one JSON object a line, "
         'such as {"question": "1+1", "answer": "2"}, or one list of such objects'),
        ("d.jsonl", b'\n[{"question": "a", "answer": 1}]\n[{"question": "b", "answer": 2}]\n',
         ":2: this line is a JSON list, and others follow; expected one JSON object a line, such as "
         '{"question": "1+1", "answer": "2"}, or one list of such objects: jq -c \'.[]\' d.jsonl > rows.jsonl'),
        ("d.json", b'[{"question": "a",\n"answer": 1}]\n{"question": "b", "answer": 2}',
         ":3: more follows after the end of the JSON list in line 2; expected one JSON object a line"),
        ("d.json", b'[{"question": "a", "answer": 1}, 3]', "[1]: expected a JSON object, found a int"),
        ("d.jsonl.gz", b"not gzip", "BadGzipFile"),
        ("d.jsonl.gz", gzip.compress(GOOD.encode() * 99, mtime=0)[:-9], "EOFError"),
        ("d.parquet", b"PAR1", "env.path cannot be read: ArrowInvalid"),
        ("d.arrow", b"ARROW1", "env.path cannot be read: ArrowInvalid"),
        ("d.txt", b"What is 1 + 1?", "must end in .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .feather"),
        ("d.xlsx", b"PK", "convert it, e.g. python -c \"import pandas; pandas.read_excel('"),
    ],
)
def test_broken_files_are_named(tokenizer, tmp_path, name, data, words):
    path = tmp_path / name
    path.write_bytes(data)
    message = problem(tokenizer, path)
    assert message.startswith(str(path))
    assert words in message


def test_a_missing_file_and_a_folder_are_named(tokenizer, tmp_path):
    assert "gone.jsonl: env.path names no file that is there" in problem(tokenizer, tmp_path / "gone.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    assert "doesn't contain any data files" in problem(tokenizer, tmp_path / "folder.jsonl")
    assert "gone.jsonl: env.eval_path names no file" in problem(tokenizer, ARITHMETIC, eval_path=str(tmp_path / "gone.jsonl"))


def test_duplicates_are_refused_or_skipped(tokenizer, tmp_path):
    path = write(tmp_path, [*rows(), {"question": "What is 3 + 1?", "answer": 5}])
    message = problem(tokenizer, path)
    assert message.startswith(f"{path}:21: the same prompt as {path}:4, with another answer ('4', '5')")
    assert len(make(tokenizer, path=path, on_duplicate="skip")._rows) == 20


def test_train_eval_overlap_is_refused_or_skipped(tokenizer, tmp_path):
    path, eval_path = write(tmp_path, rows(8)), write(tmp_path, rows(4, start=6), "eval.jsonl")
    message = problem(tokenizer, path, eval_path=eval_path)
    assert message.startswith(
        f"{path}:7: the prompt is also an evaluation row, {eval_path}:1 (2 such of 8 training rows)"
    )
    env = make(tokenizer, path=path, eval_path=eval_path, on_overlap="skip")
    assert len(env.train_rows) == 6 and len(env.eval_prompts()) == 4
    assert "nothing is left to train on" in problem(tokenizer, eval_path, eval_path=eval_path, on_overlap="skip")


def test_prompts_over_the_token_budget_are_refused_or_skipped(tokenizer, tmp_path):
    path = write(tmp_path, [*rows(), {"question": "x" * 900, "answer": 1}])
    message = problem(tokenizer, path)
    assert (
        message.startswith(f"{path}:21: the prompt has ")
        and "more than env.max_prompt_tokens=600 (1 such of 21 rows)" in message
    )
    assert len(make(tokenizer, path=path, on_long_prompt="skip")._rows) == 20
    assert "millions of characters" in problem(tokenizer, write(tmp_path, [{"question": "x" * 5_000_000, "answer": 1}]))
    assert "no prompt fits" in problem(tokenizer, path, on_long_prompt="skip", max_prompt_tokens=5)


def test_a_split_that_leaves_nothing_is_refused(tokenizer, tmp_path):
    message = problem(tokenizer, write(tmp_path, rows(1)))
    assert "env.held_out_fraction=0.25 leaves" in message and "of 1" in message
    raised = "raise it, add rows, or set env.eval_path=FILE env.held_out_fraction=null"
    for fraction, way in ((1e-9, raised), (1 - 1e-9, "lower it")):
        assert way in problem(tokenizer, write(tmp_path, rows(9)), held_out_fraction=fraction)


def test_characters_that_the_tokenizer_lacks_are_a_bad_row(tmp_path):
    path = write(tmp_path, rows())
    assert "cannot be tokenised" in problem(build_tokenizer(), path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"held_out_fraction": None}, "set exactly one"),
        ({"held_out_fraction": 1.0}, "env.held_out_fraction=1.0"),
        ({"match": "fuzzy"}, "env.match='fuzzy': must be one of exact, numeric, math, none"),
        ({"answer_key": None}, "needs env.answer_key"),
        ({"reasoning_effort": "max"}, "must be one of low, medium, high"),
        ({"current_date": "today"}, "expected YYYY-MM-DD"),
        ({"on_bad_row": "drop"}, "env.on_bad_row='drop': must be one of error, skip"),
        ({"num_eval_prompts": 0}, "env.num_eval_prompts=0"),
        ({"max_prompt_tokens": 0}, "env.max_prompt_tokens=0"),
        ({"max_error_rate": 2.0}, "env.max_error_rate=2.0"),
        ({"numeric_tolerance": -0.1}, "env.numeric_tolerance=-0.1"),
        ({"question_template": "no column"}, "names no column"),
        ({"question_template": r"{question} \boxed{answer}"}, "would put the answer into the prompt"),
        ({"match": "none"}, "every weight is 0"),
        ({"match_reward": 0.0}, "every weight is 0"),
        (
            {"rewards": [{"fn": "grpo.rewards.match:exact_match", "wieght": 1}]},
            "env.rewards[0].wieght: unknown key; did you mean weight?",
        ),
        ({"rewards": [{"weight": 1}]}, "env.rewards[0]="),
        ({"rewards": [7]}, "env.rewards[0]="),
        ({"reward_timeout": 0.0}, "env.reward_timeout=0.0"),
        ({"reward_workers": -1}, "env.reward_workers=-1"),
        ({"reward_retries": -1}, "env.reward_retries=-1"),
        ({"rewards": [{"fn": "grpo.rewards.match:exact_match"}] * 2}, "the name 'exact_match' is taken twice"),
        ({"rewards": [{"fn": "grpo.rewards.match:nothing"}]}, "env.rewards[0].fn='grpo.rewards.match:nothing'"),
    ],
)
def test_bad_keywords_name_their_key(tokenizer, changes, words):
    with pytest.raises(ValueError) as caught:
        make(tokenizer, **changes)
    assert words in str(caught.value)
