"""Tokenizer: ordinary text in, any ids out, control tokens only by id."""

import json
import random

import pytest
import tokenizers
from paths import FIXTURES
from tokenizers import models, pre_tokenizers

from models.chat.tokenizer import Tokenizer, build_tiny_tokenizer

HARMONY_NAMES = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)


@pytest.fixture
def tiny() -> Tokenizer:
    return build_tiny_tokenizer(["functions.calc", "func"], "0123456789+=,?\n <|end>")


def test_control_ids_are_those_of_the_file():
    real = Tokenizer.load(FIXTURES / "tokenizer_real_ids")
    assert (real.startoftext, real.endoftext, real.return_, real.constrain) == (199998, 199999, 200002, 200003)
    assert (real.channel, real.start, real.end, real.message, real.call) == (200005, 200006, 200007, 200008, 200012)
    assert real.stop_ids == (200002, 200012, 199999)
    assert real.vocab_size == 200019
    compact = Tokenizer.load(FIXTURES / "tokenizer_compact" / "tokenizer.json")
    assert (compact.start, compact.message, compact.end, compact.vocab_size) == (311, 313, 312, 324)


def test_text_survives_a_round_trip(tokenizer):
    texts = [
        "",
        " ",
        "Grüße 👋🏽 — 数学: ∑ᵢ xᵢ²\r\n\tx  ",
        "the developer's analysis",
        "\x00\x7f\ufffd",
        "<|end|>",
        "<<||end|>>",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_text_survives_a_round_trip_and_never_gives_a_control_id(tokenizer):
    rng = random.Random(0)
    alphabet = [
        *HARMONY_NAMES,
        "<|reserved_200013|>",
        "<|endofprompt|>",
        "<|",
        "|>",
        "<",
        "|",
        ">",
        "end",
        "a",
        "é",
        "数",
        "👋",
        " ",
        "\n",
    ]
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 12)))
        ids = tokenizer.encode(text)
        assert not any(tokenizer.is_special(id) for id in ids), text
        assert tokenizer.decode(ids) == text


def test_encoding_adds_nothing_around_the_text(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.encode("ab") == [97, 98]  # byte tokens come first in both fixtures


def test_specials_in_text_stay_text(tokenizer):
    text = "a<|start|>b<|end|>"
    spelled = tokenizer.encode(text)
    assert len(spelled) == len(text)
    assert tokenizer.decode(spelled) == text


def test_a_spelled_special_is_tokenized_as_the_text_around_it_would_be(tmp_path):
    description = json.loads((FIXTURES / "tokenizer_compact" / "tokenizer.json").read_text())
    description["model"]["vocab"]["<|"] = 324
    description["model"]["merges"].append(["<", "|"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("<|end|>") == [324, *tokenizer.encode("end|>")]


def test_decode_drops_or_spells_special_tokens(tokenizer):
    ids = [tokenizer.start, 97, tokenizer.message, 98, tokenizer.return_]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, keep_special=True) == "<|start|>a<|message|>b<|return|>"


def test_broken_utf8_decodes_to_replacement_characters(tokenizer):
    wave = tokenizer.encode("👋")  # four byte tokens
    assert len(wave) == 4
    assert tokenizer.decode(wave[:3]) == "\ufffd"
    assert tokenizer.decode(wave[2:]) == "\ufffd\ufffd"
    assert tokenizer.decode([97, *wave[:2], 98]) == "a\ufffdb"
    # Two halves of a character do not join across a control token.
    assert tokenizer.decode([*wave[:2], tokenizer.end, *wave[2:]]) == "\ufffd\ufffd\ufffd"


def test_ids_without_a_token_decode_to_replacement_characters():
    real = Tokenizer.load(FIXTURES / "tokenizer_real_ids")
    for id in (
        -1,
        303,
        199997,
        200019,
        201087,
        2**31,
        2**40,
    ):  # 303..199997: the hole between the vocabulary and the specials
        assert real.decode([97, id, 98]) == "a\ufffdb"
        assert real.decode([97, id, 98], keep_special=True) == "a\ufffdb"


def test_any_ids_decode_without_raising(tokenizer):
    rng = random.Random(1)
    for _ in range(200):
        ids = [
            rng.choice([rng.randrange(303), rng.randrange(201088), tokenizer.end, tokenizer.start]) for _ in range(20)
        ]
        assert isinstance(tokenizer.decode(ids, keep_special=True), str)


def test_text_that_is_no_unicode_is_refused(tokenizer):
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("half \ud83d")
    with pytest.raises(ValueError, match="must be a string, got NoneType"):
        tokenizer.encode(None)


def test_truncation_and_padding_saved_in_the_file_are_ignored(tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(FIXTURES / "tokenizer_compact" / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("xyzxy") == [120, 121, 122, 120, 121]


def test_control_tokens_that_a_file_does_not_mark_special_stay_out_of_text(tmp_path):
    description = json.loads((FIXTURES / "tokenizer_compact" / "tokenizer.json").read_text())
    for token in description["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.end == 312
    assert 312 not in tokenizer.encode("a<|end|>b")
    assert tokenizer.decode([97, 312]) == "a"


def test_control_tokens_that_are_words_of_the_vocabulary_stay_out_of_text(tmp_path):
    vocabulary = {word: id for id, word in enumerate([*HARMONY_NAMES, "hi", "<", "|end|>"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(HARMONY_NAMES))
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("hi <|end|> hi") == [9, 10, 11, 9]


def test_a_tokenizer_without_harmony_tokens_is_refused_by_name(tmp_path):
    description = json.loads((FIXTURES / "tokenizer_compact" / "tokenizer.json").read_text())
    gone = ("<|call|>", "<|channel|>")
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] not in gone]
    for name in gone:
        description["model"]["vocab"].pop(name, None)
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"lacks the harmony tokens <\|channel\|>, <\|call\|>\.") as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_an_id_far_above_any_vocabulary_is_refused_before_memory_is_taken(tmp_path):
    description = json.loads((FIXTURES / "tokenizer_compact/tokenizer.json").read_text())
    description["model"]["vocab"]["far away"] = 4 * 10**9
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="tokenizer.json has a token of id 4000000000"):
        Tokenizer.load(tmp_path)


def test_missing_and_malformed_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=f"no tokenizer at {tmp_path}/tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer.json is no readable tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_saving_copies_the_files_verbatim(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "out")
    copied = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert copied == ["tokenizer.json", "tokenizer_config.json"]
    source = FIXTURES / ("tokenizer_real_ids" if tokenizer.vocab_size > 400 else "tokenizer_compact")
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    Tokenizer.load(tmp_path / "out").save(tmp_path / "out")  # onto itself: unharmed
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_tiny_tokenizer_cuts_at_the_longest_word_then_at_characters(tiny):
    def spell(text):
        return [tiny.decode([id]) for id in tiny.encode(text)]

    assert spell("assistant") == ["assistant"]
    assert spell("functions.calc") == ["functions.calc"]
    assert spell("12+3=15\nanalysis 4") == ["1", "2", "+", "3", "=", "1", "5", "\n", "analysis", " ", "4"]
    assert spell("funcfinal") == ["func", "final"]
    assert tiny.decode(tiny.encode("12+3=15\nanalysis 4")) == "12+3=15\nanalysis 4"


def test_tiny_tokenizer_is_as_small_as_its_parts(tiny):
    # 7 header words, 2 words, 22 distinct characters, 9 control tokens
    assert tiny.vocab_size == 7 + 2 + 22 + 9
    assert sorted(tiny.stop_ids) == sorted({tiny.return_, tiny.call, tiny.endoftext})
    assert not any(tiny.is_special(id) for id in tiny.encode("<|end|>"))
    assert tiny.decode(tiny.encode("<|end|>")) == "<|end|>"


def test_tiny_tokenizer_refuses_characters_it_lacks_and_names_them(tiny):
    with pytest.raises(ValueError, match="no token for 'x€'"):
        tiny.encode("1x+€")


def test_tiny_tokenizer_refuses_control_tokens_and_empty_words():
    with pytest.raises(ValueError, match=r"<\|end\|> is a control token"):
        build_tiny_tokenizer(["<|end|>"], "ab")
    with pytest.raises(ValueError, match="empty string"):
        build_tiny_tokenizer([""], "ab")


def test_tiny_tokenizer_saves_and_loads_as_any_other(tiny, tmp_path):
    tiny.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    text = "assistant<|end|>functions.calc 12?"
    assert loaded.encode(text) == tiny.encode(text)
    assert loaded.decode(tiny.encode(text)) == text
    assert (loaded.vocab_size, loaded.stop_ids, loaded.start) == (tiny.vocab_size, tiny.stop_ids, tiny.start)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["pad_token"]) == ("<|return|>", "<|endoftext|>")
