"""Embedded corpora: text-audio retrieval by rule, for runs that need no download.

Five corpora of short scenes (`scene_sounds`) with captions (`scene_captions`): `base` for
pretraining, and four that differ from it, and from each other, as AudioCaps, Clotho, BBC Sound
Effects and AudioSet do. Three knobs a corpus say how far: `language` (words, grammar, what is
mentioned), `meaning` (contested words; where "high", "fast" and "loud" begin) and `acoustics`
(recording channel; which sounds are common). At 0 a corpus is one more draw of base.

A scene belongs to one split in every corpus, by a hash of its description: no test scene is ever
trained on.

    python -m data_pipelines.corpora.scenes --output=DIRECTORY [--seed=0]
"""

import argparse
import concurrent.futures
import csv
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import tempfile
import threading
import time
import zlib

import numpy as np
import soundfile
import tqdm

from data_pipelines.corpora import scene_captions, scene_sounds
from data_pipelines.corpora.scene_sounds import Scene

# Raise it whenever the same settings would give other files: it is part of every folder's name.
GENERATOR_VERSION = 6
BASE = "base"
STREAM = ("audiocaps_like", "clotho_like", "bbc_like", "audioset_like")

_CAPTIONS_PER_CLIP = {"base": 2, "clotho_like": 5}
# Share of held-out captions that may repeat an earlier one, as catalogue entries do.
_SHARED_CAPTIONS = {"bbc_like": 0.08}
_FEW_SHARED_CAPTIONS = 0.02
_SPLIT_SHARES = {"train": 0.70, "valid": 0.12, "test": 0.18}
_CHUNK = 100  # clips per message to a worker


@dataclasses.dataclass(frozen=True)
class CorpusSettings:
    """Clips per split, and the distance from the base corpus.

    language, acoustics: 0 (as base) to 1 (the corpus's own).
    meaning: 0 (words mean what they mean in base) to 2 (a contested word wherever there is one, and
        attribute scales moved twice as far as the profile says).
    """

    train: int = 1200
    valid: int = 200
    test: int = 250
    language: float = 0.6
    meaning: float = 0.7
    acoustics: float = 0.6

    def __post_init__(self):
        for name in ("train", "valid", "test"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"CorpusSettings.{name} is {getattr(self, name)}; expected a count of clips"
                )
        for name, most in (("language", 1.0), ("meaning", 2.0), ("acoustics", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(
                    f"CorpusSettings.{name} is {getattr(self, name)}; expected 0 to {most:g}"
                )


@dataclasses.dataclass(frozen=True)
class SceneSettings:
    """Everything the files depend on, beside `GENERATOR_VERSION`.

    seed: of all randomness. sampling_rate: Hz. seconds: length of every clip.
    variety: probability that a word, or the grammar, of the base corpus is borrowed from another
        style; the higher, the better a model pretrained on base knows the words of the stream.
    """

    seed: int = 0
    sampling_rate: int = 16000
    seconds: float = 2.55
    variety: float = 0.15
    base: CorpusSettings = CorpusSettings(train=7000, language=0.0, meaning=0.0, acoustics=0.0)
    audiocaps_like: CorpusSettings = CorpusSettings()
    # Fewer clips, five captions each, as in Clotho.
    clotho_like: CorpusSettings = CorpusSettings(train=400)
    bbc_like: CorpusSettings = CorpusSettings()
    audioset_like: CorpusSettings = CorpusSettings()

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"SceneSettings.seed is {self.seed}; expected an integer >= 0")
        if self.sampling_rate < 16000 or self.seconds < 2.0:
            raise ValueError(
                f"SceneSettings asks for {self.seconds} s at {self.sampling_rate} Hz; scenes need "
                "at least 2 s (three events) at 16000 Hz (the highest sounds reach 8 kHz)"
            )
        if not 0 <= self.variety <= 1:
            raise ValueError(f"SceneSettings.variety is {self.variety}; expected 0 to 1")


@dataclasses.dataclass(frozen=True)
class PlannedClip:
    """One clip before it is rendered."""

    index: int
    split: str
    scene: Scene
    captions: tuple[scene_captions.Caption, ...]

    @property
    def file_name(self) -> str:
        return f"audio/{self.index:05d}.flac"

    @property
    def group(self) -> str:
        """Scene id: equal in all corpora for equal scenes."""
        return hashlib.sha1(str(self.scene).encode()).hexdigest()[:12]


def split_of(scene: Scene) -> str:
    """The split of a scene in every corpus: 70 % train, 12 % valid, 18 % test, by SHA-1."""
    position = int(hashlib.sha1(f"scenes:{scene}".encode()).hexdigest()[:12], 16) / 16**12
    for split, share in _SPLIT_SHARES.items():
        if position < share:
            return split
        position -= share
    return "test"


def plan(corpus: str, settings: SceneSettings) -> list[PlannedClip]:
    """The scenes and captions of a corpus, without a sound: train, then valid, then test.

    Valid and test clips of one corpus are of distinct scenes, with captions that repeat only within
    a small share.
    """
    _check_names([corpus])
    own: CorpusSettings = getattr(settings, corpus)
    profile = scene_sounds.PROFILES[corpus]
    clips, taken_groups = [], set()
    for split in _SPLIT_SHARES:
        size = getattr(own, split)
        taken_captions = set()
        repeats = round(size * _SHARED_CAPTIONS.get(corpus, _FEW_SHARED_CAPTIONS))
        for index in range(len(clips), len(clips) + size):
            rng = np.random.default_rng([settings.seed, zlib.crc32(corpus.encode()), index, 0])
            while True:
                scene = scene_sounds.draw_scene(rng, profile, own.acoustics)
                if split_of(scene) != split:
                    continue
                captions = _write_captions(scene, corpus, settings, rng)
                clip = PlannedClip(index, split, scene, captions)
                if split == "train":
                    break
                if clip.group in taken_groups:
                    continue
                texts = {re.sub(r"[^a-z ]", "", caption.text) for caption in captions}
                if texts & taken_captions:
                    if repeats == 0:
                        continue
                    repeats -= 1
                taken_captions |= texts
                taken_groups.add(clip.group)
                break
            clips.append(clip)
    return clips


def _write_captions(scene, corpus, settings, rng):
    own = getattr(settings, corpus)
    captions = {}
    while len(captions) < _CAPTIONS_PER_CLIP.get(corpus, 1):
        caption = scene_captions.write_caption(
            scene, corpus, own.language, own.meaning, settings.variety, rng
        )
        captions[caption.text] = caption
    return tuple(captions.values())


def render_clip(corpus: str, clip: PlannedClip, settings: SceneSettings) -> np.ndarray:
    """The audio of a planned clip, int16 [samples]."""
    own: CorpusSettings = getattr(settings, corpus)
    rng = np.random.default_rng([settings.seed, zlib.crc32(corpus.encode()), clip.index, 1])
    rate, samples = settings.sampling_rate, round(settings.seconds * settings.sampling_rate)
    profile = scene_sounds.PROFILES[corpus]
    return scene_sounds.render(clip.scene, profile, own.meaning, own.acoustics, rate, samples, rng)


def _write_audio(directory, corpus, clips, settings):
    """Renders clips into a folder; runs in a worker process."""
    for clip in clips:
        audio = render_clip(corpus, clip, settings)
        path = directory / clip.file_name
        soundfile.write(path, audio, settings.sampling_rate, subtype="PCM_16", format="FLAC")
    return len(clips)


def _write_table(path, clips):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file_name", "caption", "label", "group", "split", "scene"])
        for clip in clips:
            for caption in clip.captions:
                row = [clip.file_name, caption.text, clip.scene.events[0].kind]
                writer.writerow([*row, clip.group, clip.split, str(clip.scene)])


def folder_name(corpus: str, settings: SceneSettings) -> str:
    """`<corpus>-<hash>` of the generator's version and the settings this corpus depends on."""
    parts = dataclasses.asdict(settings)
    relevant = {k: v for k, v in parts.items() if k == corpus or k not in scene_sounds.PROFILES}
    text = json.dumps([GENERATOR_VERSION, corpus, relevant], sort_keys=True)
    return f"{corpus}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _check_names(corpora):
    unknown = [name for name in corpora if name not in scene_sounds.PROFILES]
    if unknown:
        raise ValueError(
            f"no embedded corpus is called {unknown[0]!r}; "
            f"expected one of {list(scene_sounds.PROFILES)}"
        )


def generate(directory, settings=SceneSettings(), corpora=None, num_workers=2, progress=True):
    """Writes the embedded corpora as caption folders, or finds them already written.

    The files are bitwise the same for any `num_workers` and any choice or order of `corpora`. A
    folder appears under its name only when it is complete, so a generation that is killed, or two
    at once, do no harm.

    Args:
        directory: parent of the corpus folders; made if it does not exist.
        settings: a `SceneSettings`.
        corpora: names, by default all five.
        num_workers: processes that render. They are spawned, so with 2 or more the calling script
            needs the usual `if __name__ == "__main__":`.
        progress: whether to show a bar.

    Returns:
        dict from corpus name to the path of its folder: `audio/*.flac` and `metadata.csv`, one row
        a caption, of file_name, caption, label (kind of the first event), group (scene id), split
        and scene (canonical description).

    Raises:
        ValueError: for an unknown corpus.
    """
    names = list(scene_sounds.PROFILES) if corpora is None else list(corpora)
    _check_names(names)
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / folder_name(name, settings) for name in names}
    missing = [name for name in names if not paths[name].is_dir()]
    if not missing:
        return paths
    sizes = [getattr(getattr(settings, name), split) for name in missing for split in _SPLIT_SHARES]
    bar = tqdm.tqdm(total=sum(sizes), desc="scenes", unit="clip",
                    disable=None if progress else True)
    pool = None
    if num_workers > 1:
        spawn = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(
            num_workers, spawn, _leave_with_parent, (os.getpid(),)
        )
    aside = pathlib.Path(tempfile.mkdtemp(prefix=".partial-", dir=directory))
    try:
        pending = {}
        for name in missing:
            (aside / name / "audio").mkdir(parents=True)
            clips = plan(name, settings)
            _write_table(aside / name / "metadata.csv", clips)
            pending[name] = []
            for chunk in (clips[i : i + _CHUNK] for i in range(0, len(clips), _CHUNK)):
                task = (aside / name, name, chunk, settings)
                if pool is None:
                    bar.update(_write_audio(*task))
                else:
                    pending[name].append(pool.submit(_write_audio, *task))
        for name in missing:
            for future in pending[name]:
                bar.update(future.result())
            _publish(aside / name, paths[name])
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        shutil.rmtree(aside, ignore_errors=True)
        bar.close()
    return paths


def _leave_with_parent(parent):
    """Ends this worker when its parent is gone: it would wait for work for ever."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _publish(source, target):
    try:
        os.replace(source, target)
    except OSError:
        if not target.is_dir():  # not the other process that was first: a real error
            raise


def main():
    """Writes all corpora for a listener."""
    parser = argparse.ArgumentParser(description="Write the embedded corpora as caption folders.")
    parser.add_argument("--output", required=True, help="parent of the corpus folders")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name, path in generate(arguments.output, SceneSettings(seed=arguments.seed)).items():
        print(f"{name:15} {path}")


if __name__ == "__main__":
    main()
