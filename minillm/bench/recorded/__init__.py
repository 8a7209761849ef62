"""Recorded runs of `minillm bench` as JSON files, which chapters and READMEs quote with machine and date.

The files are written by `minillm bench gpu`, `ladder`, `replicas` or `serve` with `--json`. Dry runs are refused.
"""

import json
from pathlib import Path

from minillm.errors import ConfigError, read_text

FOLDER = Path(__file__).parent
FIELDS = ("schema", "kind", "date", "machine", "parts")  # of every record


def latest(kind: str, folder: Path = FOLDER, *, part: str | None = None) -> dict | None:
    """The newest run of a kind ("gpu", "ladder", "replicas", "serve"); with `part` the newest that has it.

    None if there is none. Raises ConfigError for other files.
    """
    runs = [load(file) for file in sorted(folder.glob("*.json"))]
    found = (run for run in runs if run["kind"] == kind and (part is None or part in run["parts"]))
    return max(found, key=lambda run: run["date"], default=None)


def load(file: Path) -> dict:
    """A recorded run. Raises ConfigError for a dry run and for any other file."""
    run = read(file)
    if "DRY RUN" in run["kind"]:
        raise ConfigError(f"{file} is of a dry run: its figures mean nothing; record a run on a GPU")
    return run


def read(file: Path) -> dict:
    """A record of `minillm bench`, also of a dry run. Raises ConfigError for any other file."""
    try:
        run = json.loads(read_text(file, "the recorded run"))
    except (ValueError, RecursionError) as error:  # ValueError also for a number with too many digits
        raise ConfigError(f"{file} cannot be read as a recorded run: {error}") from error
    missing = [name for name in FIELDS if not isinstance(run, dict) or name not in run]
    if missing:
        raise ConfigError(f"{file} is no recorded run: it has no {', '.join(missing)}; write it with minillm bench")
    return run
