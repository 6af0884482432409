import csv

import numpy as np
import pytest
import soundfile

from data_pipelines.corpora.folder import COLUMNS


def write_table(folder, rows, columns=COLUMNS):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def write_tone(path, seconds, rate, channels=1, seed=0):
    """Writes a sweep with noise, different in each channel; returns the samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * (200 + 300 * seed % 1000 + 50 * time) * time)
    samples = tone[:, None] + 0.05 * generator.normal(size=[len(time), channels])
    soundfile.write(path, samples, rate)
    return samples


@pytest.fixture
def corpus_folder(tmp_path):
    """A caption folder of 7 + 2 + 2 clips: two formats, three rates, mono and stereo, odd lengths.

    With a window of 1 s, training clips 0-6 make 1 1 1 2 1 3 1 chunks at most 3 a clip.
    """
    folder = tmp_path / "odd"
    seconds = [0.31, 1.0, 0.5, 1.7, 0.05, 4.3, 0.9, 0.6, 2.5, 0.4, 1.2]
    splits = ["train"] * 7 + ["valid"] * 2 + ["test"] * 2
    rows = []
    for i, (length, split) in enumerate(zip(seconds, splits)):
        name = f"audio/clip {i}.{'flac' if i % 2 else 'wav'}"
        write_tone(folder / name, length, (8000, 11025, 48000)[i % 3], 1 + i % 2, seed=i)
        label = "ab"[i % 2]
        for j in range(1 + i % 3):
            caption = "A sound, twice." if i in (1, 4) and j == 0 else f"sound {i} told as {j}"
            rows.append([name, caption, label, f"g{i}", split])
    write_table(folder, rows)
    return folder
