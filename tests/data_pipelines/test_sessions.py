import binascii
import collections
import dataclasses
import itertools
import pathlib

import numpy as np
import pytest

from data_pipelines.corpora import SPLIT_NAMES, Clip, make_corpus
from data_pipelines.sessions import Cut, cut_sessions


def corpus_of(counts, name="sounds", shuffle=None):
    """A corpus with so many (train, valid, test) clips a class, ids in no order."""
    clips = []
    for label, parts in counts.items():
        numbers = itertools.count()
        for split, count in zip(SPLIT_NAMES, parts):
            for _ in range(count):
                number = next(numbers)
                key = f"{(number * 7) % 10}/{label} {number}.wav"
                clips.append((split, Clip(key, pathlib.Path("x") / key, ("said",), label, "")))
    if shuffle is not None:
        clips = [clips[i] for i in np.random.default_rng(shuffle).permutation(len(clips))]
    return make_corpus(name, clips)


ODD = {"näher": (11, 0, 0), "a": (5, 0, 0), "Z": (4, 2, 3), "b, c": (17, 0, 0), "é": (10, 0, 0),
       "b": (6, 0, 0)}  # fmt: skip


def ids(split):
    return [clip.id for clip in split.clips]


def generator(*words):
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def all_ids(corpus):
    return {clip.id for split in SPLIT_NAMES for clip in getattr(corpus, split).clips}


@pytest.mark.parametrize("stream, seed", [("esc50", 0), ("esc50", 3), ("Töne", 0)])
def test_the_random_split_is_one_permutation_of_each_class_in_sorted_order(stream, seed):
    corpus = corpus_of(ODD)
    _, sessions = cut_sessions(corpus, stream, Cut(sessions=2, split_seed=seed))
    found = {clip.id: split for session in sessions for split in SPLIT_NAMES
             for clip in getattr(session, split).clips}  # fmt: skip
    random = generator(seed, binascii.crc32(stream.encode("utf-8")))
    expected = {}
    for label in ("Z", "a", "b", "b, c", "näher", "é"):  # by code point
        names = sorted(key for key in all_ids(corpus) if f"/{label} " in key)
        drawn = random.permutation(np.array(names))
        expected |= {str(key): "test" if i < len(names) // 5 else "train"
                     for i, key in enumerate(drawn)}  # fmt: skip
    assert found == expected
    assert list(found.values()).count("test") == 2 + 1 + 1 + 3 + 2 + 1


@pytest.mark.parametrize("clips, train, test", [(10, 8, 2), (98, 79, 19), (40, 32, 8), (5, 4, 1)])
def test_shares_are_those_of_the_specification(clips, train, test):
    corpus = corpus_of({"one": (clips, 0, 0), "two": (0, clips, 0)})
    _, sessions = cut_sessions(corpus, "s", Cut(sessions=2))
    assert [[len(getattr(session, split).clips) for split in SPLIT_NAMES]
            for session in sessions] == [[train, 0, test]] * 2  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_the_order_is_a_permutation_of_the_sorted_classes(seed):
    corpus = corpus_of(ODD)
    classes, sessions = cut_sessions(corpus, "us8k", Cut(sessions=3, order_seed=seed))
    order = generator(seed, binascii.crc32(b"us8k"), 1).permutation(sorted(ODD))
    assert classes == tuple(order)
    assert [{clip.label for clip in session.train.clips} for session in sessions] == [
        set(order[:2]), set(order[2:4]), set(order[4:]),
    ]  # fmt: skip
    # The split does not follow the order.
    tests = {key for session in sessions for key in ids(session.test)}
    _, others = cut_sessions(corpus, "us8k", Cut(sessions=6, order_seed=9))
    assert tests == {key for session in others for key in ids(session.test)}


def test_order_and_split_stay_those_of_the_first_results():
    # Stored when they were first drawn: another NumPy must not change published streams.
    corpus = corpus_of({label: (10, 0, 0) for label in "abcdefghij"})
    classes, sessions = cut_sessions(corpus, "esc50", Cut(sessions=5))
    assert "".join(classes) == "eibgfajhcd"
    assert ids(sessions[0].test) == ["0/e 0.wav", "8/e 4.wav", "0/i 0.wav", "2/i 6.wav"]


def test_seeds_and_names_of_streams_change_order_and_split():
    corpus = corpus_of({f"c{i:02d}": (10, 0, 0) for i in range(12)})
    cuts = [("timit2", Cut(sessions=6)), ("timit3", Cut(sessions=6)),
            ("timit2", Cut(sessions=6, order_seed=1)), ("timit2", Cut(sessions=6, split_seed=1))]
    results = [cut_sessions(corpus, stream, cut) for stream, cut in cuts]
    orders = [classes for classes, _ in results]
    tests = [frozenset(key for s in sessions for key in ids(s.test)) for _, sessions in results]
    assert len({orders[0], orders[1], orders[2]}) == 3 and orders[3] == orders[0]
    assert len({tests[0], tests[1], tests[3]}) == 3 and tests[2] == tests[0]


@pytest.mark.parametrize("cut", [
    Cut(sessions=2, valid=0.1), Cut(sessions=3, limit=6), Cut(classes_per_session=4, split="own"),
])  # fmt: skip
def test_the_order_of_files_has_no_part_in_it(cut):
    counts = {label: (8, 1, 2) for label in ODD}
    one, two = (cut_sessions(corpus_of(counts, shuffle=seed), "s", cut) for seed in (None, 5))
    assert one == two


def test_sessions_are_disjoint_and_hold_everything():
    corpus = corpus_of(ODD)
    classes, sessions = cut_sessions(corpus, "stream", Cut(sessions=3, valid=0.2))
    assert [session.name for session in sessions] == ["stream_1", "stream_2", "stream_3"]
    labels = [{clip.label for split in SPLIT_NAMES for clip in getattr(session, split).clips}
              for session in sessions]  # fmt: skip
    assert sum(map(len, labels)) == len(set().union(*labels)) == len(ODD)
    every = [key for session in sessions for split in SPLIT_NAMES
             for key in ids(getattr(session, split))]  # fmt: skip
    assert len(every) == len(set(every)) and set(every) == all_ids(corpus)
    for session in sessions:
        for name in SPLIT_NAMES:
            split = getattr(session, name)
            assert (split.corpus, split.name) == (session.name, name)
            assert all(clip.captions == (clip.label,) for clip in split.clips)
            # Classes as in the stream, ids within them.
            assert split.clips == tuple(
                sorted(split.clips, key=lambda clip: (classes.index(clip.label), clip.id))
            )


def test_classes_per_session_may_leave_a_shorter_last_session():
    corpus = corpus_of({f"c{i:02d}": (5, 0, 0) for i in range(11)})
    classes, sessions = cut_sessions(corpus, "s", Cut(classes_per_session=3))
    sizes = [len({clip.label for clip in session.train.clips}) for session in sessions]
    assert sizes == [3, 3, 3, 2] and len(classes) == 11
    with pytest.raises(ValueError, match="sessions is 4, which does not divide 11 classes; "
                                         "expected one of 1, 11, or classes_per_session"):
        cut_sessions(corpus, "s", Cut(sessions=4))
    names = [s.name for s in cut_sessions(corpus, "s", Cut(sessions=11))[1]]
    assert names[0] == "s_01" and names[-1] == "s_11"


def test_first_keeps_the_first_sessions_as_they_are():
    corpus = corpus_of({f"c{i}": (10, 0, 0) for i in range(8)})
    classes, sessions = cut_sessions(corpus, "s", Cut(sessions=4, valid=0.1))
    first, kept = cut_sessions(corpus, "s", Cut(sessions=4, valid=0.1, first=2))
    assert first == classes[:4] and kept == sessions[:2]


def test_chosen_classes_take_part_alone():
    corpus = corpus_of(ODD)
    classes, _ = cut_sessions(corpus, "s", Cut(classes=("é", "a", "b"), sessions=3))
    assert sorted(classes) == ["a", "b", "é"]
    with pytest.raises(ValueError, match="corpus 'sounds' has no c, d; it has Z, a, b, b, c, n"):
        cut_sessions(corpus, "s", Cut(classes=("c", "a", "d"), sessions=1))


def test_a_file_tells_the_order(tmp_path):
    path = tmp_path / "order.txt"
    path.write_text("é\nb, c\n\n  a \nZ\r\nb\nnäher", encoding="utf-8")
    corpus = corpus_of(ODD)
    cut = Cut(sessions=2, order_file=str(path), order_seed=7)
    classes, sessions = cut_sessions(corpus, "s", cut)
    assert classes == ("é", "b, c", "a", "Z", "b", "näher")
    assert {clip.label for clip in sessions[0].test.clips} == {"é", "b, c", "a"}
    path.write_text("é\nb, c\na\nZ\nb\na\nnah", encoding="utf-8")
    with pytest.raises(ValueError, match="order.txt: expected the 6 classes of the stream") as e:
        cut_sessions(corpus, "s", cut)
    for message in ("'näher' is not there", "'nah' is no class of", "'a' is there twice"):
        assert message in str(e.value)
    path.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="order.txt: not UTF-8"):
        cut_sessions(corpus, "s", cut)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="order.txt' does not exist"):
        cut_sessions(corpus, "s", cut)


@pytest.mark.parametrize("share, counts", [
    (0.1, (30, 30, 30)), (0.1, (50, 10, 30)), (0.25, (4, 9, 2)),
])  # fmt: skip
def test_validation_clips_are_a_share_of_a_session_and_of_its_classes_in_proportion(share, counts):
    corpus = corpus_of({f"c{i}": (count, 0, 1) for i, count in enumerate(counts)})
    cut = Cut(sessions=1, split="own", valid=share)
    (session,) = cut_sessions(corpus, "s", cut)[1]
    assert len(session.valid.clips) == round(share * sum(counts))
    held = collections.Counter(clip.label for clip in session.valid.clips)
    for i, count in enumerate(counts):
        assert abs(held[f"c{i}"] - share * count) < 1 and held[f"c{i}"] < count
    (whole,) = cut_sessions(corpus, "s", dataclasses.replace(cut, valid=0))[1]
    assert whole.valid.clips == () and whole.test == session.test
    assert sorted(ids(session.train) + ids(session.valid)) == sorted(ids(whole.train))


def test_a_small_session_still_has_a_validation_clip_and_all_its_classes():
    # 16 training clips, as two speakers of TIMIT.
    corpus = corpus_of({f"c{i}": (10, 0, 0) for i in range(4)})
    for session in cut_sessions(corpus, "timit2", Cut(sessions=2, valid=0.1))[1]:
        assert [len(getattr(session, name).clips) for name in SPLIT_NAMES] == [14, 2, 4]
    corpus = corpus_of({"one": (1, 0, 1), "two": (2, 0, 1), "three": (1, 0, 1)})
    (session,) = cut_sessions(corpus, "s", Cut(sessions=1, split="own", valid=0.1))[1]
    assert [clip.label for clip in session.valid.clips] == ["two"]
    corpus = corpus_of({"one": (1, 0, 1)})
    with pytest.raises(ValueError, match="session 's_1' has one training clip a class"):
        cut_sessions(corpus, "s", Cut(sessions=1, split="own", valid=0.1))


def test_a_split_of_the_corpus_is_kept_with_its_validation_clips():
    corpus = corpus_of({"one": (7, 2, 3), "two": (5, 1, 2), "three": (6, 0, 1), "four": (6, 0, 1)})
    path_order = Cut(sessions=4, split="grouped", valid=0.1)
    classes, sessions = cut_sessions(corpus, "s", path_order)
    sizes = {label: [len(getattr(session, name).clips) for name in SPLIT_NAMES]
             for label, session in zip(classes, sessions)}  # fmt: skip
    assert sizes == {"one": [7, 2, 3], "two": [5, 1, 2], "three": [5, 1, 1], "four": [5, 1, 1]}
    found = {key for session in sessions for key in ids(session.test)}
    assert found == set(ids(corpus.test))


def test_a_group_in_two_splits_is_refused_where_the_split_keeps_groups():
    clips = [(split, Clip(f"{i}", pathlib.Path("x"), ("a",), "a", group))
             for i, (split, group) in enumerate([("train", "g1"), ("train", "g2"), ("test", "g3"),
                                                 ("test", "g2"), ("train", ""), ("test", "")])]
    corpus = make_corpus("c", clips)
    with pytest.raises(ValueError, match="1 groups are in more than one split:\n  g2"):
        cut_sessions(corpus, "s", Cut(sessions=1, split="grouped"))
    (session,) = cut_sessions(corpus, "s", Cut(sessions=1))[1]
    assert len(session.test.clips) == 1


@pytest.mark.parametrize("limit", [5, 7, 10, 98])
def test_limit_is_the_most_clips_of_a_class_and_grows(limit):
    for split, counts in (("random", ODD), ("own", {"a": (30, 10, 8), "b": (3, 0, 1)})):
        corpus = corpus_of(counts)
        _, sessions = cut_sessions(corpus, "s", Cut(sessions=1, split=split, limit=limit))
        _, larger = cut_sessions(corpus, "s", Cut(sessions=1, split=split, limit=limit + 1))
        count = collections.Counter(
            clip.label for name in SPLIT_NAMES for clip in getattr(sessions[0], name).clips
        )
        assert count == {label: min(limit, sum(parts)) for label, parts in counts.items()}
        if split == "random":
            assert all_ids(sessions[0]) <= all_ids(larger[0])
        else:  # each part keeps its share
            sizes = [sum(clip.label == "a" for clip in getattr(sessions[0], name).clips)
                     for name in SPLIT_NAMES]  # fmt: skip
            shares = [min(1, limit / 48) * n for n in (30, 10, 8)]
            assert all(abs(size - share) < 2 for size, share in zip(sizes, shares))


def test_classes_that_cannot_be_trained_and_tested_are_all_named():
    corpus = corpus_of({"one": (4, 0, 0), "two": (9, 0, 0), "three": (0, 0, 3)})
    with pytest.raises(ValueError, match="2 of 3 classes cannot be trained and tested") as error:
        cut_sessions(corpus, "s", Cut(sessions=1))
    assert "'one' has 4 training and 0 test clips" in str(error.value)
    assert "'three' has 3 training and 0 test" in str(error.value)
    with pytest.raises(ValueError, match="'own' and limit 1: 3 of 3.*"):
        cut_sessions(corpus, "s", Cut(sessions=1, split="own", limit=1))


def test_clips_without_a_class_are_named():
    corpus = corpus_of({"one": (9, 0, 0), "": (2, 1, 0)})
    with pytest.raises(ValueError, match="corpus 'sounds': 3 clips have no class:\n  0/ 0.wav"):
        cut_sessions(corpus, "s", Cut(sessions=1))


@pytest.mark.parametrize("changes, message", [
    ({}, "stream.sessions is 0 and stream.classes_per_session 0; expected one of them"),
    ({"sessions": 2, "classes_per_session": 3}, "expected one of them, the other 0"),
    ({"sessions": -1}, "stream.sessions is -1, expected 0 or more"),
    ({"sessions": 1, "order_seed": -2}, "stream.order_seed is -2"),
    ({"sessions": 1, "limit": -2}, "stream.limit is -2"),
    ({"sessions": 1, "valid": 0.6}, "stream.valid is 0.6, expected a share from 0 to 0.5"),
    ({"sessions": 1, "valid": -0.1}, "stream.valid is -0.1"),
])  # fmt: skip
def test_impossible_cuts_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Cut(**changes)
