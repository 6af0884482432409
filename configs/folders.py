"""Your own recordings: caption folders, learned one after another.

    python -m tail_jax.train --config=configs/folders.py:method=ptat,tasks=birds+rain+traffic \
        --config.data.root=ROOT --workdir=DIR

ROOT/birds, ROOT/rain, ... each hold a metadata.csv (file_name, caption, label, group, split) and
the audio it names. The backbone is pretrained on the embedded base corpus, or, with
--config.model.checkpoint=FOLDER, read from a backbone folder.
"""

from ml_collections import ConfigDict

from configs import common, pretrain, quickstart, real_audio


def get_config(arg=None) -> ConfigDict:
    args = common.parse(arg, method="ptat", seed=0, model="mini-ast", tasks="")
    config = common.base_config(args["method"], args["seed"], args["model"], real_audio.LOG_MEL,
                                window_seconds=5.1, max_tokens=32)
    quickstart.tune(config)
    config.backbone.pretrain = pretrain.inner()
    config.stream.name = "folders"
    config.stream.tasks = tuple({"name": name, "folder": name}
                                for name in args["tasks"].split("+") if name)
    config.train.duration = "10 epochs"
    return config
