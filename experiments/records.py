"""Folders that belong to one experiment, and files that are whole or not there."""

import datetime
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tyro

Config = TypeVar("Config")


def write_atomically(file: Path, content: str) -> None:
    """Write a file that is either whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(file.name + ".draft")
    draft.write_text(content, encoding="utf-8")
    os.replace(draft, file)


def write_json(file: Path, value: Any) -> None:
    """Write JSON, atomically; paths become strings."""
    write_atomically(file, json.dumps(value, indent=2, default=str) + "\n")


def claim_folder(out: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to mix two experiments in one folder.

    Raises:
        ValueError: the folder was started with other settings.
    """
    settings = json.loads(json.dumps(settings, default=str))
    file = out / "settings.json"
    if file.exists():
        before = json.loads(file.read_text())
        if before != settings:
            changed = sorted(k for k in settings if before.get(k) != settings[k])
            raise ValueError(
                f"--out must be a new folder or one of the same options, "
                f"{str(out)!r} was started with other {', '.join(changed)}; "
                "choose another --out"
            )
    write_json(file, settings)


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """Lay out a table; all columns but the first are aligned to the right.

    >>> print(markdown(["method", "loss"], [["dense", "1.5"]]))
    | method | loss |
    |---|---:|
    | dense | 1.5 |
    """
    lines = [heads, *rows]
    texts = ["| " + " | ".join(cells) + " |" for cells in lines]
    rule = "|---|" + "---:|" * (len(heads) - 1)
    return "\n".join([texts[0], rule, *texts[1:]])


def say(line: str) -> None:
    """Print with the time of day, at once: someone may be watching a log file."""
    print(f"{datetime.datetime.now():%H:%M:%S} {line}", flush=True)


def run(main: Callable[[Config], None], config: type[Config], text: str | None) -> None:
    """Run a job with options from the command line; wrong ones end with a sentence."""
    try:
        main(tyro.cli(config, description=text))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
