"""What the commands share: flags, one-line errors, and the resolved configuration."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from typing import Any, Callable

from absl import app, flags, logging
from ml_collections import config_flags


class UserError(ValueError):
    """Something the user can mend; printed as one line."""


def define_config() -> None:
    """The --config flag (a file of `configs/`, with arguments after a colon)."""
    config_flags.DEFINE_config_file(
        "config", None, "Configuration file, e.g. configs/quickstart.py:method=ptat,seed=0; any "
        "field is set by --config.field=value.", lock_config=True)
    flags.mark_flag_as_required("config")


def run(main: Callable[[], int | None], define_flags: Callable[[], None]) -> None:
    """Parses flags and runs `main`; errors of the user's making become one line and exit code 2.

    Flags are defined here and not on import: several commands can be imported by one program.
    """
    define_flags()

    def parse(argv):
        try:
            rest = flags.FLAGS(argv)
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError,
                ImportError) as error:
            fail(error)
        if len(rest) > 1:
            fail(f"unexpected argument {rest[1]!r}; flags start with --")
        return rest

    def guarded(_):
        logging.set_verbosity(logging.WARNING)  # Orbax tells every rename
        try:
            return main()
        except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
            if os.environ.get("TAIL_JAX_TRACEBACK"):
                raise
            fail(error)

    app.run(guarded, flags_parser=parse)


def fail(error, code: int = 2) -> None:
    """Prints one line that begins with `error:` and exits."""
    text = " ".join(str(error.args[0] if isinstance(error, (KeyError, AttributeError)) and error.args
                        else error).split())
    print(f"error: {text}", file=sys.stderr)
    sys.exit(code)


def plain(config: Any) -> Any:
    """A ConfigDict as JSON would hold it: dicts, lists, numbers, strings."""
    return json.loads(json.dumps(config.to_dict() if hasattr(config, "to_dict") else config))


def check_config(workdir: pathlib.Path, config: dict) -> None:
    """Writes `config.json`, or compares with the one a run began with.

    Raises:
        UserError: if the run in `workdir` began with other settings, listing the differences.
    """
    path = workdir / "config.json"
    if path.exists():
        before = json.loads(path.read_text())
        changes = _differences(before, config)
        if changes:
            raise UserError(f"{workdir} holds a run with another configuration: "
                            + "; ".join(changes) + ". Use another --workdir, or remove this one")
        return
    workdir.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".aside")
    aside.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(aside, path)


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [line for key in sorted({*before, *now})
                for line in _differences(before.get(key), now.get(key), f"{name}.{key}".strip("."))]
    return [] if before == now else [f"{name} was {before!r}, is {now!r}"]
