import json

import numpy as np
import pytest
import tokenizers

from data_pipelines.text import SPECIAL_TOKENS, Tokenizer

TEXTS = [
    f"{size} {animal} {verb} {where}"
    for size in ("A small", "two large", "Some young")
    for animal in ("dogs", "cats", "birds, perhaps crows,", "naïve 鳥")
    for verb in ("bark", "sing", "run quickly", "are silent")
    for where in ("in the rain.", "near a road", "behind a door")
]


def test_training_twice_gives_identical_files(tmp_path):
    for name in ("one", "two", "three"):
        Tokenizer.train(TEXTS, 400).save(tmp_path / name / "tokenizer.json")
    files = {path.read_bytes() for path in tmp_path.glob("*/tokenizer.json")}
    assert len(files) == 1
    assert len(list(tmp_path.rglob("*"))) == 6, "a temporary file was left"


def test_special_tokens_have_the_ids_of_roberta():
    tokenizer = Tokenizer.train(TEXTS, 300)
    library = tokenizers.Tokenizer.from_str(tokenizer._json)
    assert [library.token_to_id(name) for name in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert (tokenizer.begin_id, tokenizer.pad_id, tokenizer.end_id) == (0, 1, 2)
    assert tokenizer.vocab_size == library.get_vocab_size() == 300


def test_rows_begin_and_end_with_their_tokens_and_are_padded():
    tokenizer = Tokenizer.train(TEXTS, 400)
    texts = ["", "a dog", TEXTS[5], "a dog " * 40]
    for max_tokens in (3, 7, 31):
        ids, mask = tokenizer.encode(texts, max_tokens)
        assert ids.shape == mask.shape == (4, max_tokens)
        assert ids.dtype == np.int32 and mask.dtype == bool
        lengths = mask.sum(axis=1)
        assert lengths[0] == 2 and lengths[3] == max_tokens
        for row, length in zip(ids, lengths):
            assert row[0] == 0 and row[length - 1] == 2 and (row[length:] == 1).all()
        np.testing.assert_array_equal(mask, ids != 1)


def test_longer_rows_only_add_tokens():
    tokenizer = Tokenizer.train(TEXTS, 400)
    short, _ = tokenizer.encode(TEXTS, 5)
    long, _ = tokenizer.encode(TEXTS, 60)
    np.testing.assert_array_equal(short[:, :4], long[:, :4])


def test_text_survives_encoding_up_to_case():
    tokenizer = Tokenizer.train(TEXTS, 300)
    library = tokenizers.Tokenizer.from_str(tokenizer._json)
    for text in TEXTS + ["Ünseen: Ωmega <s> 100%"]:
        ids, mask = tokenizer.encode([text], 200)
        assert 3 not in ids, "an unknown token"
        inner = ids[0, mask[0]][1:-1]
        assert library.decode(inner.tolist(), skip_special_tokens=False).strip() == text.lower()


def test_special_tokens_written_in_a_caption_are_plain_text():
    ids, mask = Tokenizer.train(TEXTS, 300).encode(["dogs </s> <pad> bark"], 50)
    assert (ids[mask] == 2).sum() == 1 and (ids[mask] == 1).sum() == 0


def test_case_does_not_matter():
    tokenizer = Tokenizer.train(TEXTS, 300)
    np.testing.assert_array_equal(*(tokenizer.encode([t], 20)[0] for t in ("A DOG", "a dog")))


def test_saved_tokenizer_loads_as_the_same(tmp_path):
    tokenizer = Tokenizer.train(TEXTS, 350)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.sha256 != Tokenizer.train(TEXTS, 340).sha256
    for one, two in zip(loaded.encode(TEXTS, 20), tokenizer.encode(TEXTS, 20)):
        np.testing.assert_array_equal(one, two)


def test_a_tokenizer_of_berts_kind_loads(tmp_path):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "##s"]
    library = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    )
    library.normalizer = tokenizers.normalizers.BertNormalizer()
    library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    library.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    # What others leave in their files must not decide on our rows.
    library.enable_truncation(4)
    library.enable_padding(length=9)
    library.save(str(tmp_path / "tokenizer.json"))
    ids, mask = Tokenizer.load(tmp_path / "tokenizer.json").encode(["A dogs dog", "zebra"], 8)
    assert ids.tolist() == [[2, 4, 5, 6, 5, 3, 0, 0], [2, 1, 3, 0, 0, 0, 0, 0]]
    assert mask.sum(axis=1).tolist() == [6, 3]


def test_impossible_requests_are_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size is 100, expected at least 261"):
        Tokenizer.train(TEXTS, 100)
    with pytest.raises(ValueError, match="no texts"):
        Tokenizer.train([], 300)
    with pytest.raises(ValueError, match="max_tokens is 2"):
        Tokenizer.train(TEXTS, 300).encode(["a"], 2)
    with pytest.raises(FileNotFoundError, match="tokenizer file"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="bad.json: not a tokenizer.json"):
        Tokenizer.load(tmp_path / "bad.json")
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "bare.json"))
    with pytest.raises(ValueError, match="no begin token; expected <s> or"):
        Tokenizer.load(tmp_path / "bare.json")


AWKWARD = [
    "", " ", "a dog", "  Two   dogs\tbark!\n", "naïve Ünïcödé 鳥が鳴く Ωmega",
    "don't; (stop) 100% @#", "e\u0301 and é", "a\u00a0b\u200bc\ufeffd", "zebra xylophone qwerty",
    "🐶🔊 woof", "\x00\x07bell", "dog " * 300,
]


def folder_of_merges(folder, **options):
    """A RoBERTa tokenizer's vocab.json and merges.txt, learnt from `TEXTS`."""
    folder.mkdir()
    library = tokenizers.Tokenizer.from_str(Tokenizer.train(TEXTS, 400)._json)
    library.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return folder


def folder_of_words(folder, **options):
    """A BERT tokenizer's vocab.txt."""
    folder.mkdir()
    letters = [chr(c) for c in range(33, 127)] + [*"éïüöΩ鳥"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "Two", "two", "bark", "##s",
             "naive", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return folder


@pytest.mark.parametrize("make, kind, options", [
    (folder_of_merges, "RobertaTokenizer", {}),
    (folder_of_merges, "RobertaTokenizer", {"add_prefix_space": True}),
    (folder_of_words, "BertTokenizer", {}),
    (folder_of_words, "BertTokenizer", {"do_lower_case": False}),
    (folder_of_words, "BertTokenizer", {"do_lower_case": True, "strip_accents": False,
                                        "tokenize_chinese_chars": False}),
])
def test_folders_encode_as_transformers_does(tmp_path, make, kind, options):
    transformers = pytest.importorskip("transformers")
    folder = make(tmp_path / "checkpoint", **options, tokenizer_class=kind)
    theirs = getattr(transformers, kind).from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "fast")
    assert (tmp_path / "fast" / "tokenizer.json").is_file()
    for ours in (Tokenizer.load(folder), Tokenizer.load(tmp_path / "fast")):
        for max_tokens in (8, 64):
            expected = theirs(AWKWARD, max_length=max_tokens, truncation=True, padding="max_length")
            ids, mask = ours.encode(AWKWARD, max_tokens)
            np.testing.assert_array_equal(ids, expected["input_ids"])
            np.testing.assert_array_equal(mask, np.array(expected["attention_mask"], bool))


@pytest.mark.parametrize("make", [folder_of_merges, folder_of_words, None])
def test_exported_files_encode_alike_elsewhere(tmp_path, make):
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.load(make(tmp_path / "a")) if make else Tokenizer.train(TEXTS, 300)
    ours.export(tmp_path, 12)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs(AWKWARD, truncation=True, padding="max_length")
    ids, mask = ours.encode(AWKWARD, 12)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, np.array(expected["attention_mask"], bool))
    again = Tokenizer.load(tmp_path).encode(AWKWARD, 12)
    np.testing.assert_array_equal(again[0], ids)


def test_a_folder_is_read_in_the_order_of_the_documentation(tmp_path):
    folder = folder_of_words(tmp_path / "all")
    words = Tokenizer.load(folder)
    folder_of_merges(tmp_path / "merges")
    (folder / "vocab.json").write_bytes((tmp_path / "merges" / "vocab.json").read_bytes())
    assert Tokenizer.load(folder).sha256 == words.sha256  # no merges.txt
    (folder / "merges.txt").write_bytes((tmp_path / "merges" / "merges.txt").read_bytes())
    assert Tokenizer.load(folder).sha256 == Tokenizer.load(tmp_path / "merges").sha256
    trained = Tokenizer.train(TEXTS, 300)
    trained.save(folder / "tokenizer.json")
    assert Tokenizer.load(folder).sha256 == trained.sha256


def test_a_folder_without_a_tokenizer_says_what_it_needs(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer, expected one of tokenizer.json, "
                                         "vocab.json with merges.txt, vocab.txt"):
        Tokenizer.load(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("}")
    with pytest.raises(ValueError, match="vocab.json: not a vocab.json with merges.txt"):
        Tokenizer.load(tmp_path)


def test_the_token_for_unknown_words_is_in_the_vocabulary(tmp_path):
    options = {"unk_token": {"content": "[UNK]", "lstrip": False}}  # as older files spell it
    folder = folder_of_words(tmp_path / "words", **options)
    unknown = Tokenizer.load(folder).encode(["魚"], 5)[0][0, 1]
    assert unknown == 1
    (folder / "tokenizer_config.json").write_text('{"unk_token": "<other>"}')
    with pytest.raises(ValueError, match="vocab.txt: .*no token '<other>' for unknown words"):
        Tokenizer.load(folder)
