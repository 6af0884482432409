"""What the commands share: flags, one-line errors, and the resolved configuration."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any, Callable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags


class UserError(ValueError):
    """Something the user can mend; printed as one line."""


# What absl, ml_collections and a configuration file raise while flags are parsed.
_FLAG_ERRORS = (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError)


def define_config() -> None:
    """The --config flag (a file of `configs/`, with arguments after a colon)."""
    config_flags.DEFINE_config_file(
        "config", None, "Configuration file, e.g. configs/quickstart.py:method=ptat,seed=0; any "
        "field is set by --config.field=value.", lock_config=True)
    flags.mark_flag_as_required("config")


def parse_config(arguments: Sequence[str]) -> dict:
    """The configuration that a command with these --config arguments gets, as plain values.

    Raises:
        UserError: in one line, as the command would end with.
    """
    values, argv = flags.FlagValues(), ["", *arguments]
    config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=values,
                                    sys_argv=argv)
    try:
        _check_config_file(argv)
        values(argv)
    except _FLAG_ERRORS as error:
        raise UserError(_flag_message(error, argv)) from None
    return plain(values.config)


def run(main: Callable[[], int | None], define_flags: Callable[[], None]) -> None:
    """Parses flags and runs `main`; errors of the user's making become one line and exit code 2,
    hosts that do not answer one and exit code 4.

    Flags are defined here and not on import: several commands can be imported by one program.
    """
    define_flags()

    def parse(argv):
        try:
            _check_config_file(argv)
            rest = flags.FLAGS(argv)
        except _FLAG_ERRORS as error:
            fail(_flag_message(error, argv))
        if len(rest) > 1:
            fail(f"unexpected argument {rest[1]!r}; flags start with --")
        return rest

    def guarded(_):
        logging.set_verbosity(logging.WARNING)  # Orbax tells every rename
        try:
            return main()
        except (ValueError, OSError) as error:
            if os.environ.get("TAIL_JAX_TRACEBACK"):
                raise
            fail(error, 4 if isinstance(error, ConnectionError) else 2)

    app.run(guarded, flags_parser=parse)


def fail(error, code: int = 2) -> None:
    """Prints one line that begins with `error:` and exits."""
    print("error:", *str(error).split(), file=sys.stderr)
    sys.exit(code)


def _check_config_file(argv: list[str]) -> None:
    """Left to ml_collections, a missing file shows itself on first use, as a traceback."""
    for flag, value in zip(argv[1:], [*argv[2:], ""]):
        name, equals, joined = flag.lstrip("-").partition("=")
        path = (joined if equals else value).partition(":")[0]
        if flag.startswith("-") and name == "config" and not os.path.isfile(path):
            raise UserError(f"--config: no file {path!r}; expected a configuration such as "
                            "configs/quickstart.py")


def _flag_message(error: Exception, argv: list[str]) -> str:
    """What a user can use of an error that absl or ml_collections raised about flags."""
    message = str(error)
    if isinstance(error, (KeyError, AttributeError)):  # a misspelt field, deep in quotes
        better = re.search(r'Did you mean "(.+?)" instead of "(.+?)"', message)
        found = better[2] if better else next(iter(re.findall(r"\w+", message)), "")
        flag = next((a.partition("=")[0] for a in argv if f".{found}" in a), found)
        return f"{flag}: no such setting" + (f"; did you mean {better[1]!r}?" if better else "")
    if "Traceback" in message:  # get_config raised; its own words are the last line
        return re.sub(r"^ValueError: ", "", message.strip().splitlines()[-1])
    return message


def plain(config: Any) -> Any:
    """A ConfigDict as JSON would hold it: dicts, lists, numbers, strings."""
    return json.loads(json.dumps(config.to_dict() if hasattr(config, "to_dict") else config))


def commit() -> str | None:
    """Commit of the code, with + where files have changed since; None outside a repository."""
    root = pathlib.Path(__file__).parents[1]
    git = lambda *words: subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    try:
        head, status = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "-uno")
    except OSError:
        return None
    return None if head.returncode else head.stdout.strip() + "+" * bool(status.stdout.strip())


def check_config(workdir: pathlib.Path, config: dict, write: bool = True) -> None:
    """Writes `config.json`, or compares with the one a run began with.

    Raises:
        UserError: if the run in `workdir` began with other settings, listing the differences; if
            there is none, and with `write` false there should be one.
    """
    path = workdir / "config.json"
    if path.exists():
        before = json.loads(path.read_text())
        changes = _differences(before, plain(config))
        if changes:
            raise UserError(f"{workdir} holds a run with another configuration: "
                            + "; ".join(changes) + ". Use another --workdir, or remove this one")
        return
    if not write:
        raise UserError(f"{path}: not here, though the first host has written it; expected a "
                        "--workdir on a disk that all hosts share")
    workdir.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".aside")
    aside.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(aside, path)


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [line for key in sorted({*before, *now})
                for line in _differences(before.get(key), now.get(key), f"{name}.{key}".strip("."))]
    return [] if before == now else [f"{name} was {before!r}, is {now!r}"]
