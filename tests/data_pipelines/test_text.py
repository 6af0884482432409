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
