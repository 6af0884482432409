"""Captions -> token ids, around the `tokenizers` library."""

import functools
import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers

# RoBERTa's order: models copied from it expect these ids.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_ROLES = {"begin": ("<s>", "[CLS]"), "pad": ("<pad>", "[PAD]"), "end": ("</s>", "[SEP]")}
_BYTES = 256


class Tokenizer:
    """Texts -> `<s> ... </s>` in rows of one length.

    Built by `train` or `load`. Attributes: `begin_id`, `end_id`, `pad_id`.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, source: str = "tokenizer"):
        # Both may be stored in a file; `encode` alone decides on them.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # A caption that holds the letters '</s>' is text, not the end of the text.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        ids = {}
        for role, names in _ROLES.items():
            found = [tokenizer.token_to_id(name) for name in names]
            found = [token for token in found if token is not None]
            if not found:
                raise ValueError(
                    f"{source}: the vocabulary has no {role} token; expected {' or '.join(names)}"
                )
            ids[role] = found[0]
        self.begin_id, self.pad_id, self.end_id = ids["begin"], ids["pad"], ids["end"]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns a byte-level BPE of lower-case text.

        The same texts in the same order give the same tokenizer. The vocabulary is smaller than
        `vocab_size` where the texts have not enough pairs to merge. Special tokens are RoBERTa's:
        <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> 4. Every text can be encoded, whatever its script.

        Raises:
          ValueError: no texts, or a vocabulary too small for the 256 bytes and special tokens.
        """
        smallest = _BYTES + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise ValueError(f"vocab_size is {vocab_size}, expected at least {smallest}")
        texts = list(texts)
        if not texts:
            raise ValueError("no texts to train a tokenizer on; expected the captions of a split")
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
        tokenizer.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()]
        )
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            # All bytes, seen or not: else a new letter would be unknown for ever.
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """Reads a `tokenizer.json`, of this project or of RoBERTa's or BERT's kind, or a folder.

        In a folder the first of these counts: `tokenizer.json`; `vocab.json` with `merges.txt`
        (RoBERTa's byte-level BPE); `vocab.txt` (BERT's WordPiece). The options of the last two
        (`add_prefix_space`; `do_lower_case`, `strip_accents`, `tokenize_chinese_chars`) stand in
        `tokenizer_config.json`, if there is one.

        Raises:
          FileNotFoundError: no such file or folder.
          ValueError: not a tokenizer, or one without begin, end and padding tokens.
        """
        path, kind = pathlib.Path(path), ("tokenizer.json",)
        if path.is_dir():
            names = [names for names in _FOLDERS if all((path / name).is_file() for name in names)]
            if not names:
                expected = ", ".join(" with ".join(names) for names in _FOLDERS)
                raise ValueError(f"{path}: has no tokenizer, expected one of {expected}; copy "
                                 "those files of the checkpoint too")
            kind, path = names[0], path / names[0][0]
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer file '{path}' does not exist")
        try:
            # The library raises bare Exception.
            tokenizer = _FOLDERS[kind](path)
        except Exception as error:
            raise ValueError(f"{path}: not a {' with '.join(kind)}: {error}") from error
        return cls(tokenizer, str(path))

    def save(self, path) -> None:
        """Writes a `tokenizer.json`."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        aside.write_text(self._json, encoding="utf-8")
        os.replace(aside, path)

    def export(self, directory, max_tokens: int) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` for readers other than this one.

        Those rely on the file to put begin and end around a text, and to name padding.
        """
        tokenizer = tokenizers.Tokenizer.from_str(self._json)
        begin, pad, end = map(tokenizer.id_to_token, (self.begin_id, self.pad_id, self.end_id))
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{begin} $A {end}",
            pair=f"{begin} $A {end} {end} $B {end}",
            special_tokens=[(begin, self.begin_id), (end, self.end_id)],
        )
        names = {"bos": begin, "cls": begin, "eos": end, "sep": end, "pad": pad}
        for role, found in (("unk", ("<unk>", "[UNK]")), ("mask", ("<mask>", "[MASK]"))):
            known = [name for name in found if tokenizer.token_to_id(name) is not None]
            names |= {role: known[0]} if known else {}
        config = {f"{role}_token": name for role, name in names.items()} | {
            "model_max_length": max_tokens,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        directory = pathlib.Path(directory)
        Tokenizer(tokenizer).save(directory / "tokenizer.json")
        (directory / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2) + "\n", encoding="utf-8"
        )

    def encode(self, texts: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts, cut to `max_tokens` with the end token kept, padded to `max_tokens`.

        Returns:
          ids: int32 [texts, max_tokens].
          mask: bool [texts, max_tokens], False on padding.

        Raises:
          ValueError: `max_tokens` leaves no room for a token between begin and end.
        """
        if max_tokens < 3:
            raise ValueError(f"max_tokens is {max_tokens}, expected at least 3")
        ids = np.full([len(texts), max_tokens], self.pad_id, np.int32)
        mask = np.zeros([len(texts), max_tokens], bool)
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for row, encoding in enumerate(encodings):
            tokens = [self.begin_id, *encoding.ids[: max_tokens - 2], self.end_id]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included: one more than the largest id."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of all that decides how a text is encoded, hex."""
        return hashlib.sha256(self._json.encode("utf-8")).hexdigest()

    @property
    def _json(self) -> str:
        return self._tokenizer.to_str(pretty=True)


def _from_file(path: pathlib.Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(path))


def _from_merges(path: pathlib.Path) -> tokenizers.Tokenizer:
    model = tokenizers.models.BPE.from_file(str(path), str(path.with_name("merges.txt")))
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=_options(path).get("add_prefix_space", False)
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _from_words(path: pathlib.Path) -> tokenizers.Tokenizer:
    options = _options(path)
    with open(path, encoding="utf-8") as file:
        vocabulary = {line.rstrip("\n"): i for i, line in enumerate(file)}
    unknown = options.get("unk_token", "[UNK]")
    if isinstance(unknown, dict):  # older files have the token with its options
        unknown = unknown.get("content")
    if unknown not in vocabulary:
        raise ValueError(f"has no token {unknown!r} for unknown words; copy the whole vocabulary")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(vocabulary, unk_token=unknown)
    )
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
        strip_accents=options.get("strip_accents"),  # None: where letters are lowered
        lowercase=options.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return tokenizer


# Files of a folder -> reader of the first of them.
_FOLDERS = {
    ("tokenizer.json",): _from_file,
    ("vocab.json", "merges.txt"): _from_merges,
    ("vocab.txt",): _from_words,
}


def _options(path: pathlib.Path) -> dict:
    """The `tokenizer_config.json` beside a file."""
    config = path.with_name("tokenizer_config.json")
    return json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
