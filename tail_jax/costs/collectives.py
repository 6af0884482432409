"""The collectives of a compiled program, read out of its optimised HLO."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

# Bytes that a device sends, as a multiple of the payload N in a group of n devices, where all send
# equally much and no value crosses twice (a ring; arXiv 1706.02677, section 4, for all-reduce:
# a reduce-scatter, then an all-gather).
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}
KINDS = tuple(_SENT)

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\]")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: one of KINDS.
        bytes: the payload N: of an all-reduce what each device puts in (and gets), of an
            all-gather what each device has after it, of a reduce-scatter what each has before it,
            of the others what each device puts in.
        group: n, devices that take part together.
    """

    kind: str
    bytes: int
    group: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends at least: 2 N (n - 1) / n for an all-reduce, N (n - 1) / n
        for gathers, scatters and all-to-alls, N for the others."""
        return self.bytes * _SENT[self.kind](self.group)


def read_collectives(hlo: str) -> list[Collective]:
    """The collectives of an optimised HLO module (`compiled.as_text()`), each once.

    An asynchronous one is two instructions, a start and a done, or on TPU a fusion that starts it,
    fusions that let it go on beside their own work, and one that ends it: the start counts. Those
    in groups of one device move nothing and are left out. What a loop's body does is counted once,
    however often it runs, see `count_loops`.

    Raises:
        ValueError: for replica groups in a form that is not known.
    """
    header = hlo[:hlo.find("\n")]
    devices = math.prod(int(number) for number in re.findall(
        r"\b(?:num_partitions|replica_count)=(\d+)", header))
    found = []
    for lines in _computations(hlo):
        starts = any('custom_call_target="AsyncCollectiveStart"' in line for line in lines)
        for line in lines:
            types, opcode = _split(line)
            kind = opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            if "async_collective_fusion_config" in line and not starts:
                continue
            group = _group(kind, line, devices)
            if group > 1:
                found.append(Collective(kind, _payload(kind, opcode, types, group), group))
    return found


def count_loops(hlo: str) -> int:
    """`while` instructions of a module. Its cost and its collectives count a pass of each."""
    return sum(_split(line)[1] == "while" for lines in _computations(hlo) for line in lines)


def summarize(collectives: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """{kind: {"count", "bytes", "sent_bytes"}} of the kinds that occur, a device."""
    report: dict[str, dict[str, float]] = {}
    for each in collectives:
        entry = report.setdefault(each.kind, {"count": 0, "bytes": 0, "sent_bytes": 0.0})
        entry["count"] += 1
        entry["bytes"] += each.bytes
        entry["sent_bytes"] += each.sent
    return dict(sorted(report.items()))


def _computations(hlo: str) -> Iterator[list[str]]:
    """The instructions of each computation, a line each, from their types on."""
    lines: list[str] | None = None
    for line in hlo.splitlines():
        if lines is None:
            lines = [] if _COMPUTATION.match(line) else None
        elif line.startswith("}"):
            yield lines
            lines = None
        elif match := _INSTRUCTION.match(line):
            lines.append(match[1])


def _split(line: str) -> tuple[str, str]:
    """(types, opcode) of an instruction; types are one array's, or a tuple's in parentheses."""
    end = _closing(line) if line.startswith("(") else line.find(" ")
    match = _OPCODE.match(line, end)
    return line[:end], match[1] if match else ""


def _closing(text: str) -> int:
    """The place after the parenthesis that closes the first."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"a parenthesis is not closed in the HLO: {text[:60]!r}")


def _payload(kind: str, opcode: str, types: str, group: int) -> int:
    # The start of an all-reduce has the types of its result, those of the others a tuple of
    # operands, results and what the runtime keeps.
    if opcode.endswith("-start") and kind != "all-reduce":
        types = _elements(types)[1]
    size = sum(_bytes(*array) for array in _ARRAY.findall(types))
    return size * group if kind == "reduce-scatter" else size


def _elements(types: str) -> list[str]:
    """The types of a tuple's elements; an element may be a tuple, and layouts hold commas."""
    elements, depth = [""], 0
    for letter in types[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            elements.append("")
        else:
            elements[-1] += letter
    return elements


def _bytes(dtype: str, shape: str) -> int:
    """Of an array; tokens and such have none, and booleans take a byte."""
    bits = re.match(r"[a-z]+(\d+)", dtype)
    if dtype != "pred" and bits is None:
        return 0
    elements = math.prod(int(size.strip("<= ")) for size in shape.split(",") if size)
    return elements * (8 if bits is None else int(bits[1])) // 8


def _group(kind: str, line: str, devices: int) -> int:
    """Devices of a group: from a list of lists, from [groups,size]<=[...], or from mesh axes."""
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2]
                           .partition("}}")[0] + "}")
        return len({device for pair in pairs for device in pair if pair[0] != pair[1]})
    groups = line.partition("replica_groups=")[2]
    if groups.startswith("{}") or not groups:
        return devices
    if match := re.match(r"\{\{([\d,]*)\}", groups):
        return match[1].count(",") + 1
    if match := re.match(r"\[\d+,(\d+)\]<=", groups):
        return int(match[1])
    if match := re.match(r"@?mesh\w*\[([^\]]*)\][^{]*\{([^}]*)\}", groups):
        sizes = dict(re.findall(r"'?([\w.]+)'?=(\d+)", match[1]))
        # An axis, or the part of one that follows a stride: 'x' or 'x':(stride)size.
        axes = re.findall(r"'?([A-Za-z_][\w.]*)'?(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    raise ValueError(f"replica groups in a form that is not known: {groups[:60]!r}")
