"""An ordered list of tasks from a plain description."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from data_pipelines.corpora import SPLIT_NAMES, Corpus, choose_clips, labelled, scenes
from data_pipelines.corpora.folder import read_folder
from data_pipelines.sessions import Cut, cut_sessions

_STREAM_KEYS = ("kind", "name", "root", "tasks", "scenes", "order", "limit")
_TASK_KEYS = ("name", "folder", "labels")
_CUT_KEYS = tuple(field.name for field in dataclasses.fields(Cut))
_CLASS_KEYS = ("kind", "name", "corpus", "root", "folder", "label", *_CUT_KEYS)


@dataclasses.dataclass(frozen=True)
class Stream:
    """Tasks in the order of training. Task names are unique.

    Attributes:
      classes: of a stream of classes, the names of all in the order in which they come, so that
        the clips of a task have labels from one stretch of it; () for text and audio.
    """

    name: str
    tasks: tuple[Corpus, ...]
    classes: tuple[str, ...] = ()


def build_stream(spec: Mapping) -> Stream:
    """Builds a stream from its description (a dict, or a ConfigDict).

    Keys of `spec` for text and audio:
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

    Keys of `spec` for classes, one corpus cut into sessions, the tasks:
      kind: "classes".
      name: of the stream, which is part of the seeds of split and order; by default the corpus, or
        the name of the folder.
      corpus: one of `corpora.labelled`: "esc50", "us8k", "sc2", "timit", "vocalset" in their
        official layouts, or "folder", a caption folder.
      root, folder: where it lies, `folder` relative to `root`; by default the working directory.
      label: of a caption folder, the column that holds the class, by default `label`, or several
        joined by +: `speaker+label`.
      sessions or classes_per_session, and classes, first, order_seed, order_file, split,
        split_seed, valid, limit: as in `sessions.Cut`. `split` is "random", "grouped" (fold 5 of
        ESC-50, folds 9 and 10 of UrbanSound8K, the lists of Speech Commands and of VocalSet's
        singers) or "own" (the column of a caption folder). VocalSet takes 98 clips a technique,
        and all techniques but `spoken`, unless `limit` and `classes` say other.

    Raises:
      FileNotFoundError: a folder or its table is missing.
      ValueError: an unknown key, kind, corpus or split, a missing or doubled task, an order that is
        not a permutation, a negative limit, or a faulty table; for classes also what
        `sessions.cut_sessions` raises.
    """
    kind = spec.get("kind")
    if kind not in (*_KINDS, "classes"):
        kinds = ", ".join((*_KINDS, "classes"))
        raise ValueError(f"stream.kind is {kind!r}, expected one of: {kinds}")
    if kind == "classes":
        return _class_stream(spec)
    _check_keys("stream", spec, _STREAM_KEYS)
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


def _class_stream(spec: Mapping) -> Stream:
    _check_keys("stream", spec, _CLASS_KEYS)
    known = labelled.CORPORA.get(spec.get("corpus"))
    if known is None:
        raise ValueError(
            f"stream.corpus is {spec.get('corpus')!r}, expected one of: "
            f"{', '.join(labelled.CORPORA)}"
        )
    given = {key: spec.get(key) for key in _CUT_KEYS if spec.get(key) is not None}
    given["classes"] = tuple(given.get("classes") or known.classes)
    cut = Cut(**{"limit": known.limit} | given)
    splits = ("random", *known.splits)
    if cut.split not in splits:
        raise ValueError(
            f"stream.split is {cut.split!r}, expected for {spec['corpus']}: {' or '.join(splits)}"
        )
    if spec.get("label") and not known.columns:
        raise ValueError(f"stream.label is {spec['label']!r}, but {spec['corpus']} has one class a "
                         "clip; expected it for folder alone")  # fmt: skip
    columns = {"label": spec["label"]} if spec.get("label") else {}
    root = pathlib.Path(spec.get("root") or ".") / (spec.get("folder") or "")
    corpus = known.read(root, **columns)
    if cut.split in known.splits and not corpus.test.clips:
        raise ValueError(
            f"stream.split is {cut.split!r}, but '{root}' has no test clips: "
            f"{known.splits[cut.split]}; expected them, or split 'random'"
        )
    name = spec.get("name") or corpus.name
    classes, sessions = cut_sessions(corpus, name, cut)
    return Stream(name, sessions, classes)


_KINDS = {"folders": _folder_corpora, "embedded": _embedded_corpora}


def _check_keys(where: str, spec: Mapping, known: Sequence[str]) -> None:
    unknown = sorted(set(spec.keys()) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown keys {', '.join(unknown)}; known: {', '.join(known)}")


def _limit(corpus: Corpus, limit: int) -> Corpus:
    splits = {name: getattr(corpus, name) for name in SPLIT_NAMES}
    return dataclasses.replace(
        corpus,
        **{
            name: dataclasses.replace(split, clips=choose_clips(split.clips, limit))
            for name, split in splits.items()
        },
    )
