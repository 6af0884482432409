"""Settings and fixtures of all tests."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest

from tail_jax import cli
from tests import tiny


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory):
    """The folder that holds the caption folders of `tests/tiny.py`."""
    root = tmp_path_factory.mktemp("tiny")
    tiny.write_folders(root)
    return root


@pytest.fixture
def tiny_config(tiny_root):
    """tiny_config(method="ptat", tasks=2, **{"train.duration": "3 steps"}) -> plain config."""

    def make(method="ptat", seed=0, tasks=3, **fields):
        config = tiny.get_config(f"method={method},seed={seed},root={tiny_root},tasks={tasks}")
        with config.unlocked():
            config.update_from_flattened_dict(fields)
        return cli.plain(config)

    return make
