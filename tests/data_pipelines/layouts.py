"""Published corpora in their official layouts, in miniature."""

import csv
import hashlib
import json

import numpy as np

from conftest import write_tone


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def video(number):
    """An id of 11 characters, as YouTube's."""
    return f"a-_{number:08d}"


def audiocaps_rows(sizes=(5, 2, 3)):
    """{table: rows}: one caption a clip in train, five in val and test."""
    tables, number = {}, 0
    for table, size, captions in zip(("train", "val", "test"), sizes, (1, 5, 5)):
        tables[table] = []
        for _ in range(size):
            for j in range(captions):
                text = f'a dog, "clip {number}",\nbarks {j} times'
                tables[table].append([90000 + number, video(number), 10 * number, text])
            number += 1
    return tables


def write_audiocaps_tables(folder, tables=None):
    header = ["audiocap_id", "youtube_id", "start_time", "caption"]
    for table, rows in (tables or audiocaps_rows()).items():
        write_csv(folder / f"{table}.csv", header, rows)


def write_audiocaps(folder):
    """Ten clips, audio of seven: named in several ways, in folders of the splits."""
    write_audiocaps_tables(folder / "dataset")
    names = {0: "train/{}.wav", 1: "train/Y{}.flac", 2: "train/{}_20.wav", 5: "val/{}_50_60.wav",
             6: "val/{}_60000_70000.ogg", 7: "test/Y{}_70.000_80.000.wav", 9: "test/{}_90000.wav"}
    for number, name in names.items():
        path = folder / "audio" / name.format(video(number))
        write_tone(path, 0.3 + 0.1 * number, (8000, 16000)[number % 2], 1 + number % 2, number)


def clotho_rows():
    """Three tables; one name is in two of them, with other captions, as in version 2.1."""
    names = {
        "development": ["Café №1.wav", " leading space.wav", "rain, heavy.wav", "same name.wav"],
        "validation": ["same name.wav", "b.wav"],
        "evaluation": ["c.wav", "d.wav", "e.wav"],
    }
    return {
        part: [[name, *(f'{part} {name[:3]} "{i}", told\ntwice' for i in range(5))] for name in row]
        for part, row in names.items()
    }


def write_clotho_tables(folder, tables=None):
    header = ["file_name", *(f"caption_{i}" for i in range(1, 6))]
    for part, rows in (tables or clotho_rows()).items():
        write_csv(folder / f"clotho_captions_{part}.csv", header, rows)


def write_clotho(folder):
    """Nine clips with audio."""
    write_clotho_tables(folder)
    for number, (part, rows) in enumerate(clotho_rows().items()):
        for i, (name, *_) in enumerate(rows):
            write_tone(folder / part / name, 0.4 + 0.2 * i, 11025, 1 + i % 2, 10 * number + i)


def hashed_split(corpus, key):
    """The key that the specification sorts by, without the code under test."""
    return hashlib.sha1(f"tail-v1:{corpus}:{key}".encode()).hexdigest()


def write_wavcaps_table(path, rows, captions_per_audio=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = [{"title": "t", "description": "d", "author": "a", "href": "h", "caption": caption,
             "id": name, "duration": 10.0, "download_link": "l"} for name, caption in rows]
    path.write_text(json.dumps({"num_captions_per_audio": captions_per_audio, "data": data}))


def write_wavcaps(folder, size=2010):
    """BBC and AudioSet-SL: `size` entries each, of which a few clips of every split have audio.

    AudioSet-SL has the ten videos of `audiocaps_rows` besides.
    """
    for corpus, table, part, ids in (
        ("bbc", "bbc_final.json", "BBC_Sound_Effects", [f"{i:08d}" for i in range(size)]),
        ("audioset_sl", "as_final.json", "AudioSet_SL", [video(100 + i) for i in range(size)]),
    ):
        ranked = sorted(ids, key=lambda key: hashed_split(corpus, key))
        with_audio = [*ranked[:3], *ranked[1000:1002], *ranked[2000:2004]]
        more = [video(i) for i in range(10)] if corpus == "audioset_sl" else []
        form = "Y{}.wav" if corpus == "audioset_sl" else "{}"
        rows = [(form.format(key), f"sound {key} is heard.") for key in ids + more]
        write_wavcaps_table(folder / "json_files" / part / table, rows)
        for i, key in enumerate(with_audio):
            name = form.format(key).removesuffix(".wav")
            write_tone(folder / f"{part}_flac" / f"{name}.flac", 0.3 + 0.1 * i, 32000, 1, i)


ESC50_CLASSES = ("dog", "rain, heavy", "Möwe", 'a "quoted" bell')


def esc50_rows(classes=ESC50_CLASSES):
    """Two recordings of each class in each fold, one of them cut into two clips; one class less."""
    return [
        [f"{fold}-{source}-{take}-{target}.wav", fold, target, name, target == 0, source, take]
        for target, name in enumerate(classes)
        for fold in range(1, 6)
        for source, takes in ((100 * fold + 2 * target, "AB"), (100 * fold + 2 * target + 1, "A"))
        for take in takes
        if (target, fold, take) != (2, 3, "B")
    ]


def write_esc50_table(folder, rows=None):
    header = ["filename", "fold", "target", "category", "esc10", "src_file", "take"]
    write_csv(folder / "meta" / "esc50.csv", header, rows or esc50_rows())


def write_esc50(folder):
    """59 clips of 4 classes, two of them without audio."""
    write_esc50_table(folder)
    for i, row in enumerate(esc50_rows()[2:]):
        write_tone(folder / "audio" / row[0], 0.05, (8000, 11025)[i % 2], 1 + i % 2, i)


def us8k_rows(classes=("siren", "dog_bark", "drilling")):
    """A recording of each class in each fold, cut into one to three slices."""
    return [
        [f"{source}-{number}-0-{cut}.wav", source, cut / 2, cut / 2 + 4, 1, fold, number, name]
        for number, name in enumerate(classes)
        for fold in range(1, 11)
        for source in [100 * fold + number]
        for cut in range(1 + (fold + number) % 3)
    ]


def write_us8k(folder, rows=None):
    """The table, and audio of the recordings of fold 1 and 10."""
    header = ["slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class"]
    rows = rows or us8k_rows()
    write_csv(folder / "metadata" / "UrbanSound8K.csv", header, rows)
    for name, *_, fold, _, _ in rows:
        if fold in (1, 10):
            write_tone(folder / "audio" / f"fold{fold}" / name, 0.05, 44100, 2)


def write_speech_commands(folder, words=("yes", "no", "zero"), speakers=10):
    """Two recordings of each word by each speaker; 0 and 1 are test, 2 is valid.

    Returns the ids of valid and test, and writes background noise and a file of a Mac.
    """
    lists = {"validation_list.txt": [], "testing_list.txt": []}
    for word in words:
        for speaker in range(speakers):
            for i in range(2):
                name = f"{word}/{speaker:08x}_nohash_{i}.wav"
                write_tone(folder / name, 0.05, 16000, 1, speaker)
                table = {0: "testing_list.txt", 1: "testing_list.txt", 2: "validation_list.txt"}
                if speaker in table:
                    lists[table[speaker]].append(name)
    for table, names in lists.items():
        (folder / table).write_text("\n".join(names) + "\n")
    write_tone(folder / "_background_noise_" / "white_noise.wav", 0.1, 16000)
    (folder / words[0] / "._00000000_nohash_0.wav").write_bytes(b"Mac OS X")
    return tuple([name[:-4] for name in names] for names in lists.values())


def write_sphere(path, samples, rate=16000, byte_order="01", coding=""):
    """Writes 16-bit samples behind the header of TIMIT's files (NIST SPHERE, 1,024 bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["NIST_1A", "   1024", "database_id -s5 TIMIT", "database_version -s3 1.0",
             "utterance_id -s8 cjf0_sa1", "channel_count -i 1",
             f"sample_count -i {len(samples)}", f"sample_rate -i {rate}",
             f"sample_min -i {samples.min()}", f"sample_max -i {samples.max()}",
             "sample_n_bytes -i 2", f"sample_byte_format -s2 {byte_order}",
             "sample_sig_bits -i 16"]  # fmt: skip
    lines += [f"sample_coding -s{len(coding)} {coding}"] * bool(coding)
    header = "\n".join([*lines, "end_head", ""]).encode().ljust(1024)
    path.write_bytes(header + samples.astype("<i2" if byte_order == "01" else ">i2").tobytes())


def write_timit(folder, lower=False):
    """Five speakers of ten sentences, three in TRAIN and two in TEST, as SPHERE."""
    sentences = ["SA1", "SA2", *(f"SX{i}" for i in range(5)), *(f"SI{i}" for i in range(3))]
    for number, speaker in enumerate(("FCJF0", "MDAB0", "FAKS0", "MWBT0", "FELC0")):
        part = "TEST" if number > 2 else "TRAIN"
        for i, sentence in enumerate(sentences):
            samples = np.random.default_rng([number, i]).integers(-9000, 9000, 300 + 7 * i)
            name = f"{part}/DR{number + 1}/{speaker}/{sentence}.WAV"
            write_sphere(folder / (name.lower() if lower else name), samples)
            (folder / name).with_suffix(".TXT").parent.mkdir(parents=True, exist_ok=True)
            (folder / name).with_suffix(".TXT").write_text("0 300 She had your dark suit.")


def write_vocalset(folder, techniques=("belt", "trill", "vocal_fry"), singers=6, tests=(1,)):
    """Files of each technique by each singer, one more a singer; `tests` are in the list."""
    for singer in range(singers):
        for technique in techniques:
            for i in range(2 + singer):
                category = ("scales", "arpeggios")[i % 2]
                name = f"female{singer}/{category}/{technique}/f{singer}_{technique}_{i}.wav"
                write_tone(folder / "FULL" / name, 0.05, 44100, 1, i)
    if tests:
        names = "".join(f"female{singer}\r\n" for singer in tests)
        (folder / "test_singers_technique.txt").write_bytes(names.encode())
