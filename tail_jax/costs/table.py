"""What `describe` found for TPU slices, as Markdown."""

from __future__ import annotations

_HEAD = ("topology", "batch", "memory, GB", "TFLOP", "bytes, GB", "collectives (payload, MB)",
         "sent, MB", "compute, ms", "memory, ms", "network, ms", "at least, ms")
_LEFT = (0, 5)  # columns of words; the others are of numbers


def slices_table(report: dict) -> str:
    """A table for each program of a report of `describe`, a row for each slice; all of one chip.

    The largest of the three times is bold: it bounds the program.
    """
    names = dict.fromkeys(name for where in report["slices"] for name in where["programs"])
    lines = []
    for name in names:
        lines += [f"**{name}**, of each chip", "", _row(_HEAD),
                  _row("---" if i in _LEFT else "---:" for i in range(len(_HEAD)))]
        for where in report["slices"]:
            lines.append(_row((where["topology"], f"{where['batch_size'][name]:,}",
                               *_cells(where["programs"][name]))))
        loops = max(where["programs"][name].get("loops", 0) for where in report["slices"])
        if loops:
            lines += ["", f"{loops} loops: what one pass of each does is counted, not how often it "
                          "runs."]
        lines.append("")
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    return "\n".join([*lines, f"commit {report['commit']}, {versions}"])


def _cells(program: dict) -> tuple[str, ...]:
    if "refused" in program:
        return f"does not fit: {program['refused']}", *[""] * (len(_HEAD) - 3)
    seconds, kinds = program["seconds"], program["collectives"]
    times = [_number(1e3 * seconds[kind]) for kind in ("compute", "memory", "network")]
    bound = ("compute", "memory", "network").index(program["bound"])
    times[bound] = f"**{times[bound]}**"
    note = "" if program["fits"] else " (does not fit)"
    return (_number(program["memory"]["total"] / 1e9) + note,
            _number(program["flops"] / 1e12), _number(program["accessed_bytes"] / 1e9),
            ", ".join(f"{entry['count']} {kind} ({_number(entry['bytes'] / 1e6)})"
                      for kind, entry in kinds.items()) or "none",
            _number(program["sent_bytes"] / 1e6), *times, _number(1e3 * seconds["roofline"]))


def _number(value: float) -> str:
    """Three figures, without an exponent."""
    if not value:
        return "0"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-3 else "<0.001"


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"
