"""Chips as their vendor describes them, and the least time that a program takes on one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, in units of 1 (FLOP/s, bytes, bytes/s).

    Attributes:
        flops: peak of matrix products in bfloat16, a second.
        memory: bytes of HBM.
        memory_bandwidth: of HBM.
        network_bandwidth: of all its links to other chips of a slice, in one direction.
        dimensions: of the torus that the chips of a pod form; two links in each. 0: they form none,
            and the chip is looked at by itself.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    network_bandwidth: float
    dimensions: int


# From the pages "TPU v5e", "TPU v5p" and "TPU v6e" of the Cloud TPU documentation, tables of key
# specifications. The pages give the bandwidth of interconnects in both directions (400, 1,200 and
# 800 GBps); half of it goes out. Where a page was changed later (v6e: 1,640 to 1,600 GBps of HBM,
# 3,584 to 3,200 Gbps of interconnect), the present, smaller number is taken. v4 is left out: the
# compiler counts each of a chip's two cores as a device, the machines do not.
CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, 2),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 3),
    "v6e": Chip(918e12, 32e9, 1600e9, 400e9, 2),
}
# By the name that jax has for a device. GPUs from NVIDIA's data sheets, dense (half of what they
# give with sparsity); their links are not looked at.
DEVICES = {
    "TPU v5 lite": CHIPS["v5e"],
    "TPU v5": CHIPS["v5p"],
    "TPU v6 lite": CHIPS["v6e"],
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9, 0, 0),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 0, 0),
    "NVIDIA H100 PCIe": Chip(756e12, 80e9, 2000e9, 0, 0),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9, 0, 0),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 0, 0),
}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Least times of one run of a program on every chip of a slice.

    seconds = max(compute, memory, network), compute = FLOPs / peak, memory = bytes / bandwidth of
    HBM, network = bytes sent / bandwidth of the links in use; all of one chip.

    It is a bound for a chip that does all three at once, without a gap. It leaves out: operations
    that are not bfloat16 matrix products (vector units are slower, float32 products take several
    passes) and matrices that do not fill the units; the latency of a collective, which is what many
    small ones cost; slices that are no torus, whose chips at the edge have fewer links than counted
    here, and traffic through chips in between; waiting of a collective for its input; what the host
    does, and its transfers. The compiler's bytes are those that each fused operation reads and
    writes, also where they stay in on-chip memory, so `memory` can be more than HBM takes; loops
    are counted as one pass.

    Attributes:
        compute, memory, network: seconds.
    """

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """The largest of the three."""
        return max(self.compute, self.memory, self.network)

    @property
    def bound(self) -> str:
        """Which it is."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def roofline(chip: Chip, shape: Sequence[int], flops: float, accessed: float,
             sent: float) -> Roofline:
    """The roofline of a program on a slice.

    Args:
        shape: chips of the slice in each dimension. A chip has a link in a dimension of two chips,
            two in a longer one: that share of `network_bandwidth` is counted.
        flops, accessed, sent: of one chip: operations, bytes of memory, bytes to other chips.

    Raises:
        ValueError: if a slice of one chip sends something.
    """
    links = sum(min(size - 1, 2) for size in shape) / (2 * max(chip.dimensions, 1))
    if sent and not links:
        raise ValueError(f"a slice of one chip sends {sent} bytes; expected 0")
    return Roofline(flops / chip.flops, accessed / chip.memory_bandwidth,
                    sent / (links * chip.network_bandwidth) if sent else 0.0)
