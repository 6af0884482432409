"""Properties of the embedded corpora: true captions, audible attributes, reproducible files."""

import collections
import csv
import dataclasses
import re

import librosa
import numpy as np
import pytest
import scipy.signal
import soundfile
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data_pipelines.corpora import normalise_caption, scene_captions, scene_sounds, scenes
from data_pipelines.corpora.scene_sounds import KINDS, PROFILES, Event, Profile, Scene

DEFAULT = scenes.SceneSettings()
RATE, SAMPLES = DEFAULT.sampling_rate, round(DEFAULT.seconds * DEFAULT.sampling_rate)
SMALL = scenes.CorpusSettings(train=7, valid=3, test=5)
TINY = scenes.SceneSettings(
    base=SMALL, audiocaps_like=SMALL, clotho_like=SMALL, bbc_like=SMALL, audioset_like=SMALL
)


@pytest.fixture(scope="module")
def plans():
    return {corpus: scenes.plan(corpus, DEFAULT) for corpus in PROFILES}


def sound(kind, pitch="mid", pace=None, loudness="loud", texture="clean", seed=0, room=1.1):
    pace = pace or scene_sounds.PACES[KINDS[kind].pace][-1]
    event = Event(kind, pitch, pace, loudness, texture)
    return scene_sounds.render_event(event, room, Profile(), 0.0, RATE, np.random.default_rng(seed))


def log_mel(audio):
    mel = librosa.feature.melspectrogram(
        y=np.asarray(audio, np.float32), sr=RATE, n_fft=512, hop_length=320, n_mels=40
    )
    return librosa.power_to_db(mel, amin=1e-8, top_db=None)  # [mels, frames]


def onsets(audio):
    """Count of bursts in a smoothed envelope; knows nothing of the synthesis."""
    frames = librosa.util.frame(np.pad(audio, 160), frame_length=240, hop_length=40)
    envelope = np.convolve(np.sqrt((frames**2).mean(0)), np.hanning(17) / 8, mode="same")
    peaks, _ = scipy.signal.find_peaks(np.pad(envelope, 1), prominence=0.25 * envelope.max())
    return len(peaks)


def active_seconds(audio):
    return (np.abs(audio) > 0.05 * np.abs(audio).max()).sum() / RATE


# --- captions -------------------------------------------------------------------------------------


def test_every_claim_of_every_caption_is_true_of_its_scene(plans):
    for corpus, clips in plans.items():
        for clip in clips[::3]:
            for caption in clip.captions:
                for claim in caption.claims:
                    if claim.event < 0:
                        assert claim.value == clip.scene.background
                    else:
                        assert claim.value in dataclasses.astuple(clip.scene.events[claim.event])
                    assert claim.words in scene_captions.expressions(corpus, claim.value)
                    assert claim.words in caption.text
                named = [c.event for c in caption.claims if c.value in KINDS]
                assert sorted(named) == list(range(len(clip.scene.events)))


def test_captions_hold_no_content_beside_their_claims(plans):
    carriers = set()
    for style in scene_captions.STYLES.values():
        for template in (*style.joins, *style.reverse_joins, *style.whole, *style.background):
            carriers |= set(re.findall(r"[a-z]+", template))
    for clips in plans.values():
        for clip in clips[::5]:
            for caption in clip.captions:
                words = collections.Counter(re.findall(r"[a-z]+", caption.text))
                words -= collections.Counter(
                    re.findall(r"[a-z]+", " ".join(c.words for c in caption.claims))
                )
                assert set(words) <= carriers | {"a", "an"}, caption


def test_order_of_mention_is_temporal_order_unless_the_grammar_says_otherwise(plans):
    seen_reverse = 0
    for clips in plans.values():
        for clip in clips:
            for caption in clip.captions:
                style = scene_captions.STYLES[caption.grammar]
                named = [c.event for c in caption.claims if c.value in KINDS]
                reverse = style.ordered and any(
                    join in caption.text for join in style.reverse_joins
                )
                seen_reverse += reverse
                if style.ordered:
                    assert named == sorted(named, reverse=reverse), caption
    assert seen_reverse > 100


def test_an_expression_stands_for_one_value_unless_it_is_contested():
    owners = collections.defaultdict(set)
    for value, styles in scene_captions.WORDS.items():
        for words in styles.values():
            for word in words:
                owners[word].add(value)
    assert {word: values for word, values in owners.items() if len(values) > 1} == {}
    assert not set(owners) & set(scene_captions.CONTESTED)
    assert all(len(set(senses.values())) >= 3 for senses in scene_captions.CONTESTED.values())
    assert {v for senses in scene_captions.CONTESTED.values() for v in senses.values()} <= set(
        scene_captions.WORDS
    )


def test_base_has_met_every_word_of_the_stream(plans):
    trained = [caption for c in plans["base"] if c.split == "train" for caption in c.captions]
    said = {claim.words for caption in trained for claim in caption.claims}
    listed = {e for words in scene_captions.WORDS.values() for own in words.values() for e in own}
    assert (listed | set(scene_captions.CONTESTED)) - said == set()  # no exception
    words = {word for caption in trained for word in normalise_caption(caption.text).split()}
    for corpus in scenes.STREAM:
        texts = [caption.text for clip in plans[corpus] for caption in clip.captions]
        assert {w for text in texts for w in normalise_caption(text).split()} - words == set()


def test_what_is_usual_is_common_and_seldom_said(plans):
    counts = {value: [0, 0] for value in ("soft", "loud", "rough", "clean")}  # events, mentions
    for clip in plans["base"]:
        for caption in clip.captions:
            said = {(claim.event, claim.value) for claim in caption.claims}
            for i, event in enumerate(clip.scene.events):
                for value in (event.loudness, event.texture):
                    counts[value][0] += 1
                    counts[value][1] += (i, value) in said
    for rare, usual, times in (("soft", "loud", 3), ("rough", "clean", 4)):
        assert counts[usual][0] == pytest.approx(times * counts[rare][0], rel=0.1)
        mentions = {value: counts[value][1] / counts[value][0] for value in (rare, usual)}
        assert mentions[rare] > 0.4 and mentions[usual] < 0.12


def test_test_captions_are_nearly_all_distinct(plans):
    for corpus, clips in plans.items():
        texts = [
            normalise_caption(caption.text)
            for clip in clips
            if clip.split == "test"
            for caption in clip.captions
        ]
        assert len(set(texts)) >= 200
        assert len(set(texts)) >= (0.91 if corpus == "bbc_like" else 0.97) * len(texts)


def test_clotho_like_has_five_different_captions_a_clip_base_two_and_the_others_one(plans):
    expected = dict.fromkeys(PROFILES, 1) | {"base": 2, "clotho_like": 5}
    for corpus, clips in plans.items():
        for clip in clips:
            assert len(clip.captions) == len({c.text for c in clip.captions}) == expected[corpus]


def test_no_test_scene_is_in_a_train_or_valid_split_of_any_corpus(plans):
    scenes_of = {
        (corpus, split): {str(clip.scene) for clip in clips if clip.split == split}
        for corpus, clips in plans.items()
        for split in ("train", "valid", "test")
    }
    for corpus in PROFILES:
        own: scenes.CorpusSettings = getattr(DEFAULT, corpus)
        assert len(scenes_of[corpus, "test"]) == own.test > 0  # distinct
        assert len(scenes_of[corpus, "valid"]) == own.valid > 0
        for other in PROFILES:
            assert scenes_of[corpus, "test"].isdisjoint(scenes_of[other, "train"])
            assert scenes_of[corpus, "test"].isdisjoint(scenes_of[other, "valid"])
            assert scenes_of[corpus, "valid"].isdisjoint(scenes_of[other, "train"])


def test_groups_are_equal_exactly_for_equal_scenes(plans):
    clips = [clip for clips in plans.values() for clip in clips]
    pairs = {(clip.group, str(clip.scene)) for clip in clips}
    assert len(pairs) == len({g for g, _ in pairs}) == len({s for _, s in pairs}) < len(clips)


def test_profiles_favour_only_values_that_exist(plans):
    drawn = {clip.scene.background for clip in plans["base"]}
    for clip in plans["base"]:
        for event in clip.scene.events:
            drawn |= set(dataclasses.astuple(event))
    for profile in PROFILES.values():
        assert set(profile.favours) <= drawn


def test_knobs_at_zero_speak_as_base_and_at_one_as_the_corpus():
    def plan(**knobs):
        own = scenes.CorpusSettings(train=300, valid=0, test=0, **knobs)
        return scenes.plan("bbc_like", scenes.SceneSettings(bbc_like=own, variety=0.0))

    for clip in plan(language=0.0, meaning=0.0, acoustics=0.0):
        for claim in clip.captions[0].claims:
            assert claim.words in scene_captions.WORDS[claim.value]["base"]
    for clip in plan(language=1.0, meaning=0.0):
        for claim in clip.captions[0].claims:
            assert claim.words in scene_captions.WORDS[claim.value]["bbc_like"]
    contested = [
        c.words in scene_captions.CONTESTED
        for clip in plan(language=1.0, meaning=1.0)
        for c in clip.captions[0].claims
    ]
    assert 0.2 < np.mean(contested) < 0.6


# --- sounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pitch_moves_the_spectral_centroid_by_its_step(kind):
    # Weighted by power: the resonance counts, not the wide faint skirts of onsets and of noise. The
    # same seeds, hence the same jitter, at every pitch.
    def centroid(pitch):
        power = sum(
            np.abs(np.fft.rfft(sound(kind, pitch, seed=s), 2 * RATE)) ** 2 for s in range(9)
        )
        return librosa.feature.spectral_centroid(S=power[:, None], sr=RATE, n_fft=2 * RATE).item()

    low, mid, high = (centroid(pitch) for pitch in ("low", "mid", "high"))
    assert mid / low == pytest.approx(1.39, rel=0.1)
    assert high / mid == pytest.approx(1.39, rel=0.1)


@pytest.mark.parametrize("kind", [k for k, v in KINDS.items() if v.pace == "count"])
def test_counts_are_counts_of_onsets(kind):
    for room in (0.76, 1.1):
        for count, pace in enumerate(("once", "twice", "thrice"), 1):
            assert [onsets(sound(kind, pace=pace, seed=s, room=room)) for s in range(3)] == [
                count
            ] * 3, pace


@pytest.mark.parametrize("kind", [k for k, v in KINDS.items() if v.pace == "rate"])
def test_fast_repeats_more_often_than_slow(kind):
    expected = KINDS[kind].rate

    def repetitions_per_second(pace, seed):
        audio = sound(kind, pace=pace, seed=seed, room=1.3)
        bands = librosa.feature.melspectrogram(
            y=audio, sr=RATE, n_fft=256, hop_length=32, n_mels=20
        )
        tracks = np.sqrt(bands) - np.sqrt(bands).mean(1, keepdims=True)
        count = bands.shape[1]
        lags = sum(
            np.correlate(track, track, mode="full")[count - 1 :] for track in tracks
        ) / np.arange(count, 0, -1)
        # Periods shorter than the fast one are within a grain, as the pulses of a cricket.
        shortest, longest = int(0.7 * 500 / (2.5 * expected)), int(1.3 * 500 / expected)
        lags = np.convolve(lags, np.hanning(shortest // 2 + 3), mode="same")[shortest:longest]
        peaks, _ = scipy.signal.find_peaks(lags, prominence=0.3 * np.ptp(lags))
        return 500 / (peaks[0] + shortest) if len(peaks) else np.nan  # 500 frames a second

    for pace, factor in (("slow", 1.0), ("fast", 2.5)):
        found = np.nanmedian([repetitions_per_second(pace, seed) for seed in range(5)])
        assert found == pytest.approx(factor * expected, rel=0.15), pace


@pytest.mark.parametrize("kind", [k for k, v in KINDS.items() if v.pace == "length"])
def test_long_lasts_at_least_twice_as_long_as_short(kind):
    assert active_seconds(sound(kind, pace="long")) > 2 * active_seconds(sound(kind, pace="short"))


@pytest.mark.parametrize("kind", KINDS)
def test_loudness_is_12_db_and_rough_is_noisier_than_clean(kind):
    def level(loudness):
        return 20 * np.log10(
            np.mean([np.abs(sound(kind, loudness=loudness, seed=s)).max() for s in range(9)])
        )

    def flatness(texture):
        audio = np.concatenate([sound(kind, texture=texture, seed=s) for s in range(3)])
        return np.median(
            librosa.feature.spectral_flatness(y=audio[np.abs(audio) > 1e-4], n_fft=512)
        )

    assert level("loud") - level("soft") == pytest.approx(12, abs=1.5)
    assert flatness("rough") > 1.3 * flatness("clean")


def test_events_sound_in_the_order_of_the_scene():
    drum, bird = (
        Event("drum", "low", "thrice", "loud", "clean"),
        Event("bird", "high", "fast", "loud", "clean"),
    )
    for first, second, order in ((drum, bird, 1), (bird, drum, -1)):
        scene = Scene((first, second), "none")
        audio = (
            scene_sounds.render(scene, Profile(), 0.0, 1.0, RATE, SAMPLES, np.random.default_rng(1))
            / 32768
        )
        halves = [np.abs(np.fft.rfft(half)) ** 2 for half in np.split(audio, 2)]
        treble = [half[len(half) // 4 :].sum() / half.sum() for half in halves]
        assert (treble[1] - treble[0]) * order > 0.5


def test_kinds_are_told_apart_by_a_linear_classifier_on_mean_log_mel():
    rng = np.random.default_rng(7)
    features, labels = [], []
    for kind in KINDS:
        for _ in range(24):
            draw = [
                scene_sounds.pick(rng, tuple(v))
                for v in (scene_sounds.PITCHES, scene_sounds.LOUDNESSES)
            ]
            pace = scene_sounds.pick(rng, scene_sounds.PACES[KINDS[kind].pace])
            scene = Scene(
                (
                    Event(
                        kind, draw[0], pace, draw[1], scene_sounds.pick(rng, scene_sounds.TEXTURES)
                    ),
                ),
                "none",
            )
            mel = log_mel(
                scene_sounds.render(scene, Profile(), 0.0, 1.0, RATE, SAMPLES, rng) / 32768
            )
            features.append(np.concatenate([mel.mean(1), mel.max(1), mel.std(1)]))
            labels.append(kind)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    assert cross_val_score(model, np.array(features), labels, cv=3).mean() > 0.7  # chance: 1/12


def test_each_corpus_has_its_own_channel():
    """The same scenes through two corpora differ by more than through base twice."""
    scene_set = [
        clip.scene
        for clip in scenes.plan("base", dataclasses.replace(TINY, base=scenes.CorpusSettings(40)))
    ]

    def spectrum(corpus, acoustics, seed):
        rng = np.random.default_rng(seed)
        audio = [
            scene_sounds.render(s, PROFILES[corpus], 0.0, acoustics, RATE, SAMPLES, rng)
            for s in scene_set[:40]
        ]
        return np.mean([log_mel(a / 32768).mean(1) for a in audio], axis=0)

    base, again = spectrum("base", 0.0, 0), spectrum("base", 0.0, 1)
    full = {corpus: spectrum(corpus, 1.0, 1) for corpus in scenes.STREAM}
    for corpus in scenes.STREAM:
        assert np.abs(full[corpus] - base).mean() > 2 * np.abs(again - base).mean(), corpus
        others = [
            np.abs(full[corpus] - full[other]).mean() for other in scenes.STREAM if other != corpus
        ]
        assert min(others) > 1.5, corpus  # dB
        np.testing.assert_allclose(spectrum(corpus, 0.0, 0), base, atol=1e-3)


# --- files ----------------------------------------------------------------------------------------


def files_of(path):
    return {
        str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()
    }


def test_files_do_not_depend_on_workers_or_order(tmp_path):
    one = scenes.generate(tmp_path / "one", TINY, num_workers=1, progress=False)
    two = scenes.generate(
        tmp_path / "two", TINY, list(PROFILES)[::-1], num_workers=2, progress=False
    )
    assert set(one) == set(two) == set(PROFILES)
    for corpus in PROFILES:
        assert one[corpus].name == two[corpus].name
        assert files_of(one[corpus]) == files_of(two[corpus])
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(
        p.name for p in two.values()
    )


def test_written_folder_is_a_caption_folder_of_sane_audio(tmp_path):
    settings = dataclasses.replace(
        TINY, clotho_like=scenes.CorpusSettings(train=31, valid=5, test=7)
    )
    path = scenes.generate(tmp_path, settings, ["clotho_like"], num_workers=1, progress=False)[
        "clotho_like"
    ]
    with open(path / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 43
    assert collections.Counter(row["split"] for row in rows) == {
        "train": 155,
        "valid": 25,
        "test": 35,
    }
    assert {row["label"] for row in rows} <= set(KINDS)
    assert {row["file_name"] for row in rows} == {
        f"audio/{f.name}" for f in (path / "audio").iterdir()
    }
    for name in {row["file_name"] for row in rows}:
        info = soundfile.info(path / name)
        assert (info.samplerate, info.frames, info.channels, info.subtype) == (
            RATE,
            SAMPLES,
            1,
            "PCM_16",
        )


def test_audio_is_neither_silent_nor_clipped(plans):
    for corpus, clips in plans.items():
        for clip in clips[::50]:
            audio = scenes.render_clip(corpus, clip, DEFAULT) / 32768
            assert audio.shape == (SAMPLES,)
            assert np.abs(audio).max() < 0.985
            assert -60 < 20 * np.log10(np.sqrt(np.mean(audio**2))) < -6, (corpus, str(clip.scene))


def test_finished_folder_is_reused_and_other_settings_get_another(tmp_path):
    first = scenes.generate(tmp_path, TINY, ["base"], num_workers=1, progress=False)["base"]
    (first / "marker").touch()
    assert scenes.generate(tmp_path, TINY, ["base"], progress=False)["base"] == first
    assert (first / "marker").exists()
    # Another corpus's knob leaves this corpus alone; a seed or a knob of its own does not.
    other = dataclasses.replace(TINY, bbc_like=scenes.CorpusSettings(language=0.5))
    assert scenes.folder_name("base", other) == first.name
    assert scenes.folder_name("base", dataclasses.replace(TINY, seed=1)) != first.name
    assert scenes.folder_name("bbc_like", other) != scenes.folder_name("bbc_like", TINY)


def test_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(soundfile, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        scenes.generate(tmp_path, TINY, ["base"], num_workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_folder_published_meanwhile_by_another_process_is_kept(tmp_path, monkeypatch):
    rival = scenes.generate(tmp_path / "rival", TINY, ["base"], num_workers=1, progress=False)[
        "base"
    ]
    write_table = scenes._write_table

    def write_slowly(path, clips):
        write_table(path, clips)
        (tmp_path / "mine").mkdir(exist_ok=True)
        rival.rename(tmp_path / "mine" / rival.name)

    monkeypatch.setattr(scenes, "_write_table", write_slowly)
    path = scenes.generate(tmp_path / "mine", TINY, ["base"], num_workers=1, progress=False)["base"]
    assert len(files_of(path)) == 1 + SMALL.train + SMALL.valid + SMALL.test
    assert [p.name for p in (tmp_path / "mine").iterdir()] == [path.name]


def test_bad_settings_and_names_are_refused_with_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match="'esc10'.*audiocaps_like"):
        scenes.generate(tmp_path, TINY, ["esc10"])
    with pytest.raises(ValueError, match="meaning is 3.*0 to 2"):
        scenes.CorpusSettings(meaning=3)
    with pytest.raises(ValueError, match="8000 Hz.*16000 Hz"):
        scenes.SceneSettings(sampling_rate=8000)
