"""The four corpora of TAIL in their official layouts, in miniature."""

import csv
import hashlib
import json

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
