"""Text <-> token ids over a Hugging Face `tokenizer.json`, with harmony's control tokens by name.

Departure from `transformers`: `encode` never turns text into a control token. A user who types "<|end|>" gets the
tokens of those seven characters; control ids enter a sequence only by id. Nothing is added around the text (no bos).
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from itertools import compress, groupby
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

NAMES = ("startoftext", "endoftext", "return", "constrain", "channel", "start", "end", "message", "call")
CONTROL_TOKENS = [f"<|{name}|>" for name in NAMES]  # as tokenizer.json spells them
# whole tokens of every tiny tokenizer, so that a harmony header costs as few tokens as with the real one
HEADER_WORDS = ("system", "developer", "user", "assistant", "analysis", "commentary", "final")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",  # names the ids that end a completion
)
LARGEST_ID = 2**24  # a model takes memory per id
REPLACEMENT = "\ufffd"


class Tokenizer:
    """Encodes ordinary text, decodes any ids, and knows harmony's control ids.

    `start end message channel constrain return_ call endoftext startoftext` are ids; `stop_ids` end a completion;
    `vocab_size` is the largest id + 1 (ids in between may be unassigned).
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, name: str, source: Path | None):
        """`name` is how errors call it; `save` copies the files of folder `source` (None: made in memory)."""
        missing = [text for text in CONTROL_TOKENS if backend.token_to_id(text) is None]
        if missing:
            raise ValueError(
                f"tokenizer {name} lacks the harmony tokens {', '.join(missing)}. A gpt-oss tokenizer (o200k_harmony) "
                f"has all of {' '.join(CONTROL_TOKENS)}: use the tokenizer files that came with the checkpoint"
            )
        backend = _with_control_tokens_special(backend)
        # A fine-tune may have saved its training-time truncation in tokenizer.json; it would cut prompts silently.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # special tokens spelled in text are text
        self._backend, self._name, self._source = backend, name, source
        added = backend.get_added_tokens_decoder()
        self._special_text = {id: token.content for id, token in added.items() if token.special}
        self._special_id = {text: id for id, text in self._special_text.items()}
        self._special_pattern = re.compile(f"({_any_of(self._special_id)})")
        ids = backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids) + 1
        if self.vocab_size > LARGEST_ID:
            raise ValueError(
                f"tokenizer {name} has a token of id {self.vocab_size - 1}; no gpt-oss vocabulary passes {LARGEST_ID}: copy the "
                "tokenizer files of the checkpoint again"
            )
        self._ordinary = set(ids) - self._special_text.keys()  # tokens of text
        (self.startoftext, self.endoftext, self.return_, self.constrain, self.channel, self.start, self.end, self.message,
         self.call) = (self._special_id[text] for text in CONTROL_TOKENS)
        self.stop_ids = (self.return_, self.call, self.endoftext)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads `tokenizer.json` (the file, or a folder with it). ValueError if missing, malformed or not harmony's."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"no tokenizer at {file}: give a folder that holds tokenizer.json, or the file itself "
                             "(a checkpoint without one needs model.tokenizer)")
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception for every defect of the file
            raise ValueError(f"{file} is no readable tokenizer.json: {error}. Copy it again from its checkpoint") from error
        return cls(backend, name=str(file), source=file.parent)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files: verbatim copies if it was loaded, so that all its readers read them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self._source is None:
            text = self._backend.to_str(pretty=True)  # the library's own save hides what the disk said
            (folder / "tokenizer.json").write_text(text, encoding="utf-8")
            config = json.dumps(_hub_tokenizer_config(), indent=2) + "\n"
            (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
            return
        for file_name in TOKENIZER_FILES:
            source, target = self._source / file_name, folder / file_name
            if source.is_file() and not (target.exists() and source.samefile(target)):
                shutil.copyfile(source, target)

    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary and how text becomes ids."""
        data = self._backend.to_str().encode() if self._source is None else Path(self._name).read_bytes()
        return hashlib.sha256(data).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: no control id comes out, whatever it spells. ValueError if it cannot be encoded."""
        if not isinstance(text, str):
            raise ValueError(f"text to encode must be a string, got {type(text).__name__}: {text!r:.80}")
        ids = self._encode_ordinary(text)
        if not self._special_text.keys().isdisjoint(ids):
            # The vocabulary holds a control token as an ordinary word: encode its first character apart from the rest.
            ids = []
            for i, piece in enumerate(self._special_pattern.split(text)):
                halves = (piece[:1], piece[1:]) if i % 2 else (piece,)
                ids += [id for half in halves for id in self._encode_ordinary(half)]
            leaked = sorted(self._special_text[id] for id in set(ids) & self._special_text.keys())
            if leaked:
                raise ValueError(f"tokenizer {self._name} makes control tokens {leaked} of plain text; it cannot be used")
        return ids

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """Text of any ids, without raising: invalid UTF-8 and ids that have no token become U+FFFD.

        Special tokens are dropped, or spelled out with `keep_special`; either way bytes on their two sides never join
        into one character.
        """
        pieces: list[str] = []
        for is_text, run in groupby(ids, self._ordinary.__contains__):
            if is_text:
                pieces.append(self._backend.decode(list(run), skip_special_tokens=False))
            else:
                shown = (id for id in run if keep_special or id not in self._special_text)
                pieces += [self._special_text.get(id, REPLACEMENT) for id in shown]
        return "".join(pieces)

    def is_special(self, id: int) -> bool:
        """Whether this id is a control token (harmony's or reserved)."""
        return id in self._special_text

    def places_of_special(self, ids: list[int]) -> list[int]:
        """The indices of the control tokens among the ids."""
        return list(compress(range(len(ids)), map(self._special_text.__contains__, ids)))

    def _encode_ordinary(self, text: str) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises plain Exception or TypeError
            if any("\ud800" <= char <= "\udfff" for char in text):
                reason = "it holds half of a surrogate pair, which no UTF-8 text can; repair the row it comes from"
            else:
                known = self._backend.get_vocab()
                strange = sorted({char for char in text if char not in known})
                reason = (
                    f"no token for {''.join(strange)!r}; leave these characters out or use a larger tokenizer ({error})"
                )
            raise ValueError(f"tokenizer {self._name} cannot encode {text!r:.80}: {reason}") from error


def build_tiny_tokenizer(words: list[str], chars: str) -> Tokenizer:
    """An offline tokenizer for tiny models: one token per word of `words`, per character of `chars`, per control token.

    Roles and channel names are always words. Text is cut after the longest word that starts at each position, else
    after one character; a character without a token makes `encode` raise ValueError. Ids: words, then characters, then
    control tokens.
    """
    vocabulary: dict[str, int] = {}
    for entry in [*HEADER_WORDS, *words, *chars]:
        if not entry:
            raise ValueError("an empty string cannot be a word of a tokenizer: remove it from `words`")
        if entry in CONTROL_TOKENS:
            raise ValueError(f"{entry} is a control token and cannot be a word as well: remove it from `words`")
        vocabulary.setdefault(entry, len(vocabulary))
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary))  # no unk token: unknown characters raise
    long_entries = [entry for entry in vocabulary if len(entry) > 1]
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{_any_of(long_entries)}|[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()  # no spaces between tokens
    return _made_in_memory(backend)


def build_byte_tokenizer(words: list[str]) -> Tokenizer:
    """An offline tokenizer for tiny models that reads any text: one token per word of `words`, per byte of UTF-8 elsewhere, per
    control token. Roles and channel names are always words. Ids: bytes, words, control tokens."""
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # spells each byte as a printable character
    spelled = {word: to_bytes.pre_tokenize_str(word)[0][0] for word in dict.fromkeys([*HEADER_WORDS, *words])}
    vocabulary = {entry: id for id, entry in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *spelled.values()])}
    # a piece that is an entry becomes one token (ignore_merges), any other, without merges, its bytes
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges=[], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_any_of(spelled)), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return _made_in_memory(backend)


def _any_of(texts: Iterable[str]) -> str:
    """A regular expression for these texts, the longest first, since one may be the beginning of another."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))


def _made_in_memory(backend: tokenizers.Tokenizer) -> Tokenizer:
    backend.add_special_tokens(CONTROL_TOKENS)
    return Tokenizer(backend, name="built in memory", source=None)


def _with_control_tokens_special(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer with harmony's tokens marked special: only special tokens can be kept out of ordinary text."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    if special.issuperset(CONTROL_TOKENS):
        return backend
    description = json.loads(backend.to_str())
    added = {token["content"]: token for token in description["added_tokens"]}
    for text in CONTROL_TOKENS:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added[text] = {"id": backend.token_to_id(text), "content": text, **flags}
    description["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def _hub_tokenizer_config() -> dict:
    """tokenizer_config.json that transformers and vLLM read: o200k_harmony's roles for the special tokens."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
