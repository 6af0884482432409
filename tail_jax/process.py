"""Programs in processes of their own; the memory of a process, and what it compiles."""

from __future__ import annotations

import ctypes
import os
import pathlib
import resource
import subprocess
import sys

_STATUS = pathlib.Path("/proc/self/status")
# Of mallopt(3): trim nothing, take nothing by mmap, and have one heap, the only one that grows to
# any size.
_KEEP = {-1: -1, -4: 0, -8: 1}


def run_python(code: str, *arguments: str) -> str:
    """What a program prints.

    Raises:
        ValueError: it failed; the last line of what it said.
    """
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ValueError(f"{' '.join(arguments)}: {said[-1]}")
    return done.stdout.strip()


def resident_bytes() -> int:
    """Of this process, now.

    Raises:
        ValueError: the system has no /proc, which tells it.
    """
    if not _STATUS.is_file():
        raise ValueError(f"{_STATUS} is missing; expected Linux, which tells memory there")
    return _kilobytes("VmRSS") * 1024


def peak_bytes() -> int:
    """Largest resident set of this process; elsewhere than on Linux also that of who started it."""
    if _STATUS.is_file():
        return _kilobytes("VmHWM") * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_programs() -> None:
    """Turns jax's persistent compilation cache on, where nobody has chosen or refused one."""
    import jax
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir",
                          os.path.expanduser("~/.cache/tail_jax/compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def keep_freed_memory() -> bool:
    """Has the C library keep what is freed for later; whether it did.

    On a CPU, XLA asks for the temporary memory of a program each time it runs it, gigabytes for a
    large train step; reading a clip takes ten megabytes in a few arrays. glibc takes such blocks
    from the system and gives them back, and the system fills each page with zeros: a sixth of the
    time of a step, two thirds of that of a clip. Limit: glibc (before 2.38) cannot always take
    again an aligned block of the size that it freed, and may hold two of them. What the environment
    says of malloc (MALLOC_...) is left as it is. Before jax is asked for anything.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    return all([libc.mallopt(name, value) for name, value in _KEEP.items()])


def give_back_freed_memory() -> None:
    """Gives the system all whole pages that are free, wherever they lie (glibc)."""
    ctypes.CDLL(None).malloc_trim(0)


def _kilobytes(name: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[name].split()[0])
