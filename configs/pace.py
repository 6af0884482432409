"""Class-incremental audio classification: the published streams, and any labelled folder.

    python -m tail_jax.train --config=configs/pace.py:stream=esc50,method=pace --workdir=DIR \
        --config.model.checkpoint=EAT --config.data.root=ESC50
    python -m tail_jax.train --config=configs/pace.py:stream=folder,folder=esc10,sessions=5 \
        --workdir=DIR --config.data.root=FOLDER_WITH_esc10

EAT is a checkpoint of EAT or SSLAM; ESC50 the folder of the corpus as it unpacks. Arguments:

    stream     esc50, us8k, sc2, timit2, timit3, vocalset, or folder
    method     of the class-incremental ones (`methods.for_streams("classifies")`)
    seed       of the run, and of the order of the classes
    folder     with stream=folder: a caption folder below data.root, split by its own column
    sessions   and into how many sessions of equally many classes it is cut
    label      and the column that holds the class, or several joined by +
    seconds    window of a folder's clips, 5.1 by default; 1.28 holds a spoken digit
    tasks      only so many sessions, from the first on (0: all)
    settings   a file of `sweep --tune` with the method's settings, as configs/best/esc10.json, or
               default (the method's own: the published ones, made for a backbone of full size)

A folder is learned on a small backbone that is pretrained here, without labels or captions, on the
embedded base corpus, at 16 kHz. It takes 128 frames, so the window decides how far they lie apart
(`common.mini_front_end`), and every window has a backbone of its own.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import common, pretrain_eat
from data_pipelines.front_end import KALDI
from tail_jax import best

# Sessions and epochs are the paper's. The class streams of TIMIT differ in name, and so in their
# random split and order.
PUBLISHED = {
    "esc50": ("esc50", 10, "10 epochs"),
    "us8k": ("us8k", 5, "15 epochs"),
    "sc2": ("sc2", 7, "1 epochs"),
    "timit2": ("timit", 315, "30 epochs"),
    "timit3": ("timit", 210, "30 epochs"),
    "vocalset": ("vocalset", 8, "6 epochs"),
}
# Streams whose frozen features already separate the classes: tuned in the first session alone.
COARSE = ("esc50", "us8k", "sc2")
# Beginnings of the names of methods whose rates are for SGD; those of the others are for Adam.
SGD = ("pace", "aper", "lda", "fecam", "acil", "ranpac", "slca", "joint_lora")
# 512 frames of 25 ms, 10 ms apart, of which 5.12 s give 510.
FILTERBANK = dataclasses.replace(KALDI, frames=512)


def get_config(arg=None) -> ConfigDict:
    args = common.parse(arg, stream="folder", method="pace", seed=0, model="", folder="",
                        sessions=5, label="label", seconds=5.1, tasks=0, settings="default")
    own = args["stream"] == "folder"
    if not own and args["stream"] not in PUBLISHED:
        raise ValueError(f"config argument stream={args['stream']}; expected folder or one of "
                         f"{', '.join(PUBLISHED)}")
    if own:
        log_mel, window = common.mini_front_end(args["seconds"])
        config = common.base_config(args["method"], args["seed"], args["model"] or "mini-eat",
                                    log_mel, window_seconds=window, max_tokens=24, classes=True)
        config.backbone.pretrain = pretrain_eat.inner(window)
        config.backbone.pretrain.seed = args["seed"]
        corpus, sessions, config.train.duration = "folder", args["sessions"], "10 epochs"
    else:
        config = common.base_config(args["method"], args["seed"], args["model"] or "eat-base",
                                    FILTERBANK, window_seconds=5.12, max_tokens=24, classes=True)
        config.backbone.kind = "checkpoint"
        corpus, sessions, config.train.duration = PUBLISHED[args["stream"]]
        if sessions > 100:  # PACE's files, with its merged update and classifier, have 120 MB each
            config.train.tuning_files = "last"
    config.stream = ConfigDict({
        "kind": "classes", "corpus": corpus, "sessions": sessions, "order_seed": args["seed"],
        "name": args["folder"] or args["stream"], "folder": args["folder"],
        "split": "own" if own else "random", "label": args["label"] if own else "",
        "classes": (), "first": args["tasks"], "order_file": "", "split_seed": 0, "valid": 0.0})
    if args["settings"] != "default":
        best.apply(config.method, args["settings"], classes=True)
    if args["stream"] in COARSE and "multi_session" in config.method:
        config.method.multi_session = False
    # Batches are the paper's; SGD with momentum and a cosine is ours. Nothing is clipped there: the
    # gradients of a head that starts from zero are large, its few steps are all it has.
    config.train.batch_size = 24
    if args["method"].startswith(SGD):
        config.optimizer.update(kind="sgd", momentum=0.9, warmup=0.0, clip=0.0)
    config.eval.batch_size = 64
    return config
