"""Execute the chapters and write them in one canonical form, so that a second run changes no byte.

Outputs of measurements (cells tagged `timing`) are kept until `--refresh` asks for new ones: such a cell stores a hash
of the source that its outputs belong to. All other outputs come from the run.
"""

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from minillm.course.student import CourseError, read_notebook

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
CELL_TIMEOUT_S = 120

# One thread, offline, silent, so that a chapter prints the same on every machine. The Makefile sets the same variables.
QUIET_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

TIMING, WIDGET, RAISES, IGNORE = "timing", "widget", "raises-exception", "nbval-ignore-output"
KNOWN_TAGS = {TIMING, WIDGET, RAISES, IGNORE}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
CANONICAL_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
VALID_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
ABSOLUTE_PATH = re.compile(r"(?<![\w.~/])/(?:home|root|Users|tmp|work|opt|usr|var|mnt|private)/\w|\b[A-Z]:\\\w")
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
PICTURE = re.compile(r'src="data:image/png;base64,[A-Za-z0-9+/=]*"')


# Cells --------------------------------------------------------------------------------------------


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# Executing ----------------------------------------------------------------------------------------


def execute(notebook: NotebookNode, folder: Path, allow_errors: bool = False) -> NotebookNode:
    """Run all cells of `notebook` in place, in a fresh kernel of this environment started in `folder`."""
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        allow_errors=allow_errors,
        coalesce_streams=True,
        record_timing=False,
        store_widget_state=False,
        extra_arguments=["--log-level=ERROR"],  # hides a warning about the unencrypted local connection
    )
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    return client.execute(env=environment | QUIET_ENVIRONMENT)


def keep_timings(notebook: NotebookNode, before: NotebookNode) -> None:
    """Give each timing cell its outputs in `before`, if they were made by the cell's present source."""
    executed = {cell.id: cell for cell in code_cells(before) if cell.execution_count is not None}
    for cell in code_cells(notebook):
        old = executed.get(cell.id)
        if TIMING in tags(cell) and old is not None and old.metadata.get("measured") == digest(cell.source):
            cell.outputs = old.outputs


# Canonical form -----------------------------------------------------------------------------------


def canonicalise(notebook: NotebookNode) -> NotebookNode:
    """Rewrite an executed notebook in place: counts 1..N, unique ids, bare metadata, no widget views."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict(CANONICAL_METADATA)
    give_ids(notebook.cells)
    for cell in notebook.cells:
        cell.source = cell.source.rstrip()
        cell.metadata = canonical_metadata(cell)
    for count, cell in enumerate(code_cells(notebook), start=1):
        cell.execution_count = count
        cell.outputs = [canonical_output(output, count) for output in cell.outputs if not is_widget(output)]
    return notebook


def give_ids(cells: list[NotebookNode]) -> None:
    """Keep the first use of each valid id; derive the others from the cell's source."""
    taken = set()
    for cell in cells:
        name = cell.get("id", "")
        if not VALID_ID.fullmatch(name) or name in taken:
            cell.id = next(name for name in derived_ids(cell) if name not in taken)
        taken.add(cell.id)


def derived_ids(cell: NotebookNode) -> Iterator[str]:
    name = digest(cell.cell_type + cell.source)
    yield name
    for number in range(2, 1000):
        yield f"{name}-{number}"


def canonical_metadata(cell: NotebookNode) -> NotebookNode:
    metadata = {"tags": sorted(set(tags(cell)))} if tags(cell) else {}
    if TIMING in tags(cell):
        metadata["measured"] = digest(cell.source)
    return nbformat.from_dict(metadata)


def is_widget(output: NotebookNode) -> bool:
    return WIDGET_VIEW in output.get("data", {})


def canonical_output(output: NotebookNode, count: int) -> NotebookNode:
    """Remove parts that differ from run to run: addresses, and tracebacks, which name files of this machine."""
    if output.output_type == "error":
        output.traceback = [f"{output.ename}: {output.evalue}"]
    elif output.output_type == "stream":
        output.text = ADDRESS.sub(" at 0x...", output.text)
    else:
        for mime, value in output.data.items():
            if mime.startswith("text/"):
                output.data[mime] = ADDRESS.sub(" at 0x...", value)
    if output.output_type == "execute_result":
        output.execution_count = count
    return output


# What is wrong with a notebook --------------------------------------------------------------------


def problems(notebook: NotebookNode) -> list[str]:
    """One line per rule that a committed notebook breaks; an empty list if it breaks none."""
    found = list(notebook_problems(notebook))
    for number, cell in enumerate(notebook.cells):
        where = f"cell {number} ({cell.get('id', 'no id')})"
        found += [f"{where}: {problem}" for problem in cell_problems(cell)]
    return found


def notebook_problems(notebook: NotebookNode) -> Iterator[str]:
    if notebook.metadata != CANONICAL_METADATA:
        yield "metadata is more than the bare kernelspec"
    ids = [cell.get("id", "") for cell in notebook.cells]
    if len(set(ids)) < len(ids) or not all(VALID_ID.fullmatch(name) for name in ids):
        yield "cell ids are not unique and valid"
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield "execution counts are not 1..N"
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        yield "the first cell is not a markdown title"


def cell_problems(cell: NotebookNode) -> Iterator[str]:
    if not cell.source.strip():
        yield "is empty"
    if unknown := set(tags(cell)) - KNOWN_TAGS:
        yield f"has unknown tags {sorted(unknown)}; known are {sorted(KNOWN_TAGS)}"
    if cell.metadata != canonical_metadata(cell):
        yield "has metadata other than sorted tags, or its timings belong to an older source"
    if ABSOLUTE_PATH.search(cell.source):
        yield "names an absolute path"
    if cell.cell_type == "code":
        yield from code_problems(cell)


def code_problems(cell: NotebookNode) -> Iterator[str]:
    if cell.source.rstrip().endswith(";"):
        yield "ends with ';' (assign the value to _ instead)"
    if {TIMING, WIDGET} & set(tags(cell)) and IGNORE not in tags(cell):
        yield f"is tagged {TIMING} or {WIDGET} but not {IGNORE}"
    if IGNORE in tags(cell) and not {TIMING, WIDGET} & set(tags(cell)):
        yield f"is tagged {IGNORE} but neither {TIMING} nor {WIDGET}"
    if (RAISES in tags(cell)) != any(output.output_type == "error" for output in cell.outputs):
        yield f"raises without the tag {RAISES}, or has the tag and does not raise"
    for output in cell.outputs:
        yield from output_problems(output)


def output_problems(output: NotebookNode) -> Iterator[str]:
    if output.get("name") == "stderr":
        yield f"writes to stderr: {output.text[:80]!r}"
    if is_widget(output):
        yield "holds a widget view"
    if output != canonical_output(nbformat.from_dict(output), output.get("execution_count")):
        yield "has an output that is not canonical"
    if ABSOLUTE_PATH.search(readable(output)):
        yield "prints an absolute path"


def readable(output: NotebookNode) -> str:
    """The text of an output, without pictures."""
    data = output.get("data", {})
    shown = [PICTURE.sub("", value) for mime, value in data.items() if mime.startswith("text/")]
    return "\n".join([output.get("text", ""), output.get("evalue", ""), *shown])


# The command --------------------------------------------------------------------------------------


def rebuild(path: Path, refresh: bool) -> list[str]:
    """Execute one chapter and write it in canonical form; returns what its author still has to correct."""
    before = read_notebook(path)
    give_ids(before.cells)
    notebook = execute(nbformat.from_dict(before), path.parent)
    untagged = [c.id for c in code_cells(notebook) if any(map(is_widget, c.outputs)) and WIDGET not in tags(c)]
    if not refresh:
        keep_timings(notebook, before)
    found = problems(canonicalise(notebook))
    found += [f"cell {name} shows a widget but is not tagged {WIDGET}" for name in untagged]
    path.write_text(as_text(notebook), encoding="utf-8")
    return found


def as_text(notebook: NotebookNode) -> str:
    return nbformat.writes(notebook) + "\n"


def check(path: Path) -> list[str]:
    """The problems of a chapter's file, without running it."""
    notebook = read_notebook(path)
    found = problems(notebook)
    if not found and as_text(canonicalise(notebook)) != path.read_text(encoding="utf-8"):
        found.append("is not written canonically")
    return found


def chapters(names: list[str], folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebooks whose name starts with one of `names`, in order; all of them when no name is given."""
    found = sorted(folder.glob("*.ipynb"))
    if not found:
        raise CourseError(f"there are no notebooks in {folder}")
    unknown = [name for name in names if not any(path.name.startswith(name) for path in found)]
    if unknown:
        raise CourseError(f"no chapter {', '.join(unknown)}; there are {', '.join(path.stem for path in found)}")
    return [path for path in found if not names or path.name.startswith(tuple(names))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minillm.course.notebooks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="CHAPTER", help="such as 01, or 03_kv_cache; all by default")
    parser.add_argument("--check", action="store_true", help="only list problems; run and write nothing")
    parser.add_argument("--refresh", action="store_true", help="measure the cells tagged `timing` again")
    parser.add_argument("--dir", type=Path, default=NOTEBOOKS, help="the folder of the notebooks")
    arguments = parser.parse_args(argv)

    try:
        return rebuild_or_check(chapters(arguments.names, arguments.dir), arguments)
    except CourseError as error:
        print(error, file=sys.stderr)
        return 2


def rebuild_or_check(paths: list[Path], arguments: argparse.Namespace) -> int:
    """Print the problems of each chapter; returns 1 if there are any."""
    failed = False
    for path in paths:
        try:
            found = check(path) if arguments.check else rebuild(path, arguments.refresh)
        except CellExecutionError as error:
            found = [f"a cell failed; nothing was written\n{error}"]
        print(f"{path.name}: {'to correct' if found else 'ok'}", flush=True)
        print("".join(f"  {problem}\n" for problem in found), end="", flush=True)
        failed = failed or bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
