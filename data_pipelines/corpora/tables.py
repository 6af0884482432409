"""CSV tables and lists, read strictly."""

import csv
import pathlib
from collections.abc import Sequence


def read_lines(path: pathlib.Path) -> list[tuple[int, str]]:
    """Returns (line number, text) of the lines of a UTF-8 file that are not empty, stripped.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"list '{path}' does not exist") from None
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def read_rows(table: pathlib.Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Returns (line number, row) of every row of a CSV file in UTF-8 with a header.

    Args:
      table: the file.
      columns: those that must be there; others may be.

    Raises:
      ValueError: not CSV or not UTF-8, a column is missing, a row has more or fewer fields than the
        header, or there are no rows.
    """
    try:
        # strict: by default a quote that is never closed swallows the rest of the file in silence.
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            found = reader.fieldnames or []
            missing = [column for column in columns if column not in found]
            if missing:
                raise ValueError(
                    f"{table}: missing columns {', '.join(missing)}; found "
                    f"{', '.join(found) or 'an empty file'}, expected {', '.join(columns)}"
                )
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    fields = sum(value is not None for key, value in row.items() if key is not None)
                    fields += len(row.get(None, ()))
                    raise ValueError(
                        f"{table} line {reader.line_num}: {fields} fields, expected {len(found)}; "
                        "quote captions that contain commas"
                    )
                rows.append((reader.line_num, row))
    except UnicodeDecodeError as error:
        raise _not_utf8(table, error) from error
    except csv.Error as error:
        raise ValueError(f"{table} line {reader.line_num}: not valid CSV: {error}") from error
    if not rows:
        raise ValueError(f"{table}: no rows below the header; is it the whole file?")
    return rows


def _not_utf8(path: pathlib.Path, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})")
