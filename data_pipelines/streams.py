"""An ordered list of tasks from a plain description."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence

from data_pipelines.corpora import SPLIT_NAMES, Corpus, Split, scenes
from data_pipelines.corpora.folder import read_folder

_STREAM_KEYS = ("kind", "name", "root", "tasks", "scenes", "order", "limit")
_TASK_KEYS = ("name", "folder", "labels")


@dataclasses.dataclass(frozen=True)
class Stream:
    """Tasks in the order of training. Task names are unique."""

    name: str
    tasks: tuple[Corpus, ...]


def build_stream(spec: Mapping) -> Stream:
    """Builds a stream from its description (a dict, or a ConfigDict).

    Keys of `spec`:
      kind: "folders", caption folders on disk (what `data_pipelines.build` writes is one, too), or
        "embedded", the synthetic corpora of `corpora.scenes`, generated where they are not yet.
      name: of the stream; by default the kind.
      root: folder that the folders of the tasks are relative to; by default the working directory.
        For "embedded", where the corpora are generated.
      tasks: list of {name, folder, labels}; `name` defaults to the name of the folder, `labels`
        keeps only clips with these labels (default: all). For "embedded", `folder` is one of the
        synthetic corpora, by default that of the task's name: several tasks may be of one corpus.
      scenes: settings of the embedded corpora (`scenes.SceneSettings`) that are not the default.
      order: names of the tasks in another order; empty keeps the order of the list.
      limit: most clips of a split, 0 for all. The subset depends on the ids of the clips alone,
        and a smaller one is part of a larger one.

    Raises:
      FileNotFoundError: a folder or its table is missing.
      ValueError: an unknown key or kind, a missing or doubled task, an order that is not a
        permutation, a negative limit, or a faulty table.
    """
    _check_keys("stream", spec, _STREAM_KEYS)
    kind = spec.get("kind")
    if kind not in _KINDS:
        raise ValueError(f"stream.kind is {kind!r}, expected one of: {', '.join(_KINDS)}")
    corpora = _KINDS[kind](spec)
    names = [corpus.name for corpus in corpora]
    if len(set(names)) != len(names):
        raise ValueError(f"stream.tasks: names are not unique: {', '.join(names)}")
    order = list(spec.get("order") or names)
    if sorted(order) != sorted(names):
        raise ValueError(
            f"stream.order is {', '.join(map(str, order))}; expected each of these once: "
            f"{', '.join(names)}"
        )
    limit = spec.get("limit") or 0
    if limit < 0:
        raise ValueError(f"stream.limit is {limit}, expected 0 (all clips) or more")
    ordered = [corpora[names.index(name)] for name in order]
    return Stream(spec.get("name") or kind, tuple(_limit(corpus, limit) for corpus in ordered))


def _folder_corpora(spec: Mapping) -> list[Corpus]:
    tasks = spec.get("tasks") or ()
    if not tasks:
        raise ValueError("stream.tasks is empty, expected a list of {name, folder, labels}")
    root = pathlib.Path(spec.get("root") or ".")
    corpora = []
    for number, task in enumerate(tasks):
        where = f"stream.tasks[{number}]"
        _check_keys(where, task, _TASK_KEYS)
        if not task.get("folder"):
            raise ValueError(f"{where} has no folder; expected the path of a caption folder")
        corpora.append(
            read_folder(root / task["folder"], task.get("name"), task.get("labels") or None)
        )
    return corpora


def _embedded_corpora(spec: Mapping) -> list[Corpus]:
    given = dict(spec.get("scenes") or {})
    for name in (scenes.BASE, *scenes.STREAM):
        if name in given:
            default = getattr(scenes.SceneSettings(), name)
            given[name] = dataclasses.replace(default, **given[name])
    tasks = [(task["name"], task.get("folder") or task["name"]) for task in spec.get("tasks") or ()]
    folders = scenes.generate(spec.get("root") or ".", scenes.SceneSettings(**given),
                              dict.fromkeys(corpus for _, corpus in tasks))
    return [read_folder(folders[corpus], name) for name, corpus in tasks]


_KINDS = {"folders": _folder_corpora, "embedded": _embedded_corpora}


def _check_keys(where: str, spec: Mapping, known: Sequence[str]) -> None:
    unknown = sorted(set(spec.keys()) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown keys {', '.join(unknown)}; known: {', '.join(known)}")


def _limit(corpus: Corpus, limit: int) -> Corpus:
    splits = {
        name: _limit_split(getattr(corpus, name), limit) for name in SPLIT_NAMES
    }
    return dataclasses.replace(corpus, **splits)


def _limit_split(split: Split, limit: int) -> Split:
    if not limit or len(split.clips) <= limit:
        return split
    ranked = sorted(split.clips, key=lambda clip: hashlib.sha1(clip.id.encode()).hexdigest())
    chosen = {clip.id for clip in ranked[:limit]}
    return dataclasses.replace(
        split, clips=tuple(clip for clip in split.clips if clip.id in chosen)
    )
