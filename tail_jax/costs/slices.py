"""TPU slices that need not be there: the compiler knows them by name."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from tail_jax.costs.roofline import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice.

    Attributes:
        kind: name of the chip, of CHIPS.
        shape: chips in each dimension.
    """

    kind: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As 'v5e:4x4'."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(self.shape)

    @property
    def chip(self) -> Chip:
        """What each of them can do."""
        return CHIPS[self.kind]


def parse_slices(text: str) -> tuple[Slice, ...]:
    """'v5e:1x1,v5e:4x4' -> slices.

    Raises:
        ValueError: for a name that is none, a chip that is not in CHIPS, or a number of dimensions
            that it has not.
    """
    slices = []
    for name in text.split(","):
        match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name.strip())
        if match is None:
            raise ValueError(f"topology {name!r}; expected a chip and its slice, as v5e:4x4")
        kind, shape = match[1], tuple(map(int, match[2].split("x")))
        if kind not in CHIPS:
            raise ValueError(f"topology {name!r}: chip {kind!r} is not known; expected one of "
                             f"{', '.join(CHIPS)}")
        if len(shape) != CHIPS[kind].dimensions:
            raise ValueError(f"topology {name!r} has {len(shape)} dimensions; slices of {kind} "
                             f"have {CHIPS[kind].dimensions}")
        slices.append(Slice(kind, shape))
    return tuple(slices)


def check_compiler() -> None:
    """Raises ValueError where the TPU's compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("--topology compiles with the TPU's compiler, libtpu, which is not "
                         "installed; pip install 'tail_jax[tpu]' (no TPU is needed)")


def devices(where: Slice) -> list[jax.Device]:
    """Devices to compile for, one a chip; nothing can run on them.

    Raises:
        ValueError: if the compiler is not installed, or knows no such slice.
    """
    check_compiler()
    # Compiling asks no machine what it is, and leaves a TPU here, if any, to whoever holds it.
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"),
                        ("TPU_ACCELERATOR_TYPE", "v5litepod-1"),
                        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")):
        os.environ.setdefault(name, value)
    # A host has up to 2 x 2 chips of these; the compiler would have it in every slice.
    host = tuple(min(size, most) for size, most in zip((*where.shape, 1)[:3], (2, 2, 1)))
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=where.name, chips_per_host_bounds=host).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"the compiler knows no slice {where.name}: {error}") from None
    if len(found) != where.chips:
        raise ValueError(f"the compiler has {len(found)} devices for {where.name}; expected "
                         f"{where.chips}, one a chip")
    return list(found)
