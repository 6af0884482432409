"""Settings and fixtures of all tests."""

import importlib.metadata
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's older code for fused operations: tiny models compile in half the time, in processes that
# tests start too. `launch/test.sh --slow` leaves XLA as users have it. From jaxlib 0.11 on there is
# no older code, and XLA ends a process that names a flag it does not know.
_OLDER = importlib.metadata.version("jaxlib").startswith("0.10.")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false" if _OLDER else "")

import pathlib
import subprocess
import sys

import jax
import pytest

from tests import tiny, tiny_classes
from tail_jax import cli

ROOT = pathlib.Path(__file__).parents[1]


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items):
    """Several processes (--dist=loadgroup) take whole files, whose tests share what they make; a
    file may name smaller groups."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(request):
    """Programs compiled once for all tests, processes and sessions: most time goes there."""
    folder = str(request.config.cache.mkdir("jax"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    return folder


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory):
    """The folder that holds the caption folders of `tests/tiny.py`."""
    root = tmp_path_factory.mktemp("tiny")
    tiny.write_folders(root)
    return root


@pytest.fixture(scope="session")
def tiny_config(tiny_root):
    """tiny_config(method="ptat", tasks=2, **{"train.duration": "3 steps"}) -> plain config."""

    def make(method="ptat", seed=0, tasks=3, **fields):
        config = tiny.get_config(f"method={method},seed={seed},root={tiny_root},tasks={tasks}")
        with config.unlocked():
            config.update_from_flattened_dict(fields)
        return cli.plain(config)

    return make


@pytest.fixture(scope="session")
def tiny_classes_config(tmp_path_factory):
    """tiny_classes_config("l2p", sessions=2, **{"train.duration": "3 steps"}) -> plain config."""
    root = tmp_path_factory.mktemp("tiny_classes")
    tiny_classes.write_folder(root)

    def make(method="sequential", sessions=0, seed=0, **fields):
        config = tiny_classes.get_config(
            f"method={method},seed={seed},root={root},tasks={sessions}")
        with config.unlocked():
            config.update_from_flattened_dict(fields)
        return cli.plain(config)

    return make


@pytest.fixture(scope="session")
def run_python(compilation_cache):
    """run_python(*arguments, devices=1, cwd=ROOT) -> the finished process, its output as text.

    It compiles as the test that starts it does: with `quick_compilation` or not.
    """

    def run(*arguments, devices=1, timeout=300, cwd=ROOT):
        environment = os.environ | {
            "PYTHONPATH": f"{cwd}{os.pathsep}{ROOT}", "JAX_COMPILATION_CACHE_DIR": compilation_cache}
        if devices > 1:
            environment["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
        return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=environment,
                              capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture(scope="module")
def quick_compilation():
    """Halves the time XLA takes to compile tiny models, which is most of such a test.

    The processes that a test starts compile in the same way.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    # Programs in memory are found again whatever the setting; those made here round in another way,
    # and a later test that compares bits with another process would meet them.
    jax.clear_caches()
