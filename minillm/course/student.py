"""The reader's copies of the chapters: without solutions and outputs; the reader's work is kept.

A solution is between `### BEGIN SOLUTION` and `### END SOLUTION` (nbgrader's markers): the body of a function, or a
guess such as `my_guess = 3` outside of functions.
`learn/.manifest.json` has the hash of each copy that was written; the reader has changed a file with a different hash.
"""

import ast
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbformat import NotebookNode

from minillm.errors import MiniLLMError, check_kind, check_text, read_text, shown

PACKAGE = Path(__file__).resolve().parents[1]
MANIFEST = ".manifest.json"
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
DEFINITION = re.compile(r"(\s*)(?:async\s+)?def\s+(\w+)")
CHECK = re.compile(r"\bchecks\.(?!(?:beside|key_reads|needs|is_written)\b)\w+\(")  # these check nothing
RAISES = "raises-exception"  # after a cell with this tag, JupyterLab and nbclient continue
ASSIGNMENT = re.compile(r"(\w+) = [^#]*?(\s*#.*)?")


class CourseError(MiniLLMError):
    """A chapter does not exist, or its exercises are not marked correctly."""


class Prepared(NamedTuple):
    """The result of `learn` for one chapter."""

    path: Path
    action: str  # "new", "unchanged", "updated", "replaced" or "kept"


# Taking the solutions out -------------------------------------------------------------------------


def student_copy(notebook: NotebookNode) -> NotebookNode:
    """The notebook as the reader gets it: bodies of exercises are missing, and nothing is executed."""
    copy = nbformat.from_dict(notebook)
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.source = without_solutions(cell.source)
            cell.outputs, cell.execution_count = [], None
            if CHECK.search(cell.source):  # it may raise, and later cells must still run
                cell.metadata["tags"] = sorted({*cell.metadata.get("tags", []), RAISES})
    return copy


def has_solution(source: str) -> bool:
    return BEGIN in source


def without_solutions(source: str) -> str:
    """Replace the text between the markers by the reader's starting point."""
    kept: list[str] = []
    solution: list[str] | None = None  # lines of the present region
    for line in source.split("\n"):
        marker = line.strip()
        if marker == (END if solution is None else BEGIN):
            raise CourseError(f"{marker!r} without its partner in the cell:\n{source}")
        if marker == BEGIN:
            solution = []
        elif marker == END:
            kept += start_from(solution, kept, indentation(line))
            solution = None
        else:
            (kept if solution is None else solution).append(line)
    if solution is not None:
        raise CourseError(f"{BEGIN!r} without {END!r} in the cell:\n{source}")
    return "\n".join(kept)


def start_from(solution: list[str], lines_above: list[str], indent: int) -> list[str]:
    """The replacement of a solution: a line that raises in a function, guesses set to None at the top level."""
    if indent == 0:
        return [unset(line) for line in solution]
    for line in reversed(lines_above):
        definition = DEFINITION.match(line)
        if definition and len(definition[1]) < indent:
            return [f'{" " * indent}raise NotImplementedError("write {definition[2]}")']
    raise CourseError(f"{BEGIN!r} is indented, but below no function: {solution[:1]}")


def unset(line: str) -> str:
    """`guess = 3  # ms` -> `guess = None  # ms`"""
    assignment = ASSIGNMENT.fullmatch(line)
    if assignment is None:
        raise CourseError(f"outside a function a solution holds lines like `guess = 3`, not {line!r}")
    return f"{assignment[1]} = None{assignment[2] or ''}"


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


# The solutions ------------------------------------------------------------------------------------


class Solution(NamedTuple):
    """The chapter's definition of an exercise, after the imports of its cell."""

    source: str
    place: str  # "03_kv_cache, cell cache-append"


def solution(name: str) -> Solution | None:
    """The course's version of an exercise; None if no chapter has one of this name."""
    return _solutions(source_folder()).get(name)


@functools.cache
def _solutions(folder: Path) -> dict[str, Solution]:
    """Names of functions and classes -> solutions, of all chapters."""
    found: dict[str, Solution] = {}
    for path in sorted(folder.glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "code" and has_solution(text):
                place = f"{path.stem}, cell {cell['id']}"
                found |= {name: Solution(source, place) for name, source in definitions(text)}
    return found


def definitions(source: str) -> Iterator[tuple[str, str]]:
    """(name, source) of each function and class with a marked solution. Other lines except imports are left blank."""
    lines = source.split("\n")
    tree = ast.parse(source).body
    imports = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in tree:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if has_solution("\n".join(lines[first - 1 : node.end_lineno])):
                kept = {n for each in imports for n in range(each.lineno, each.end_lineno + 1)}
                kept |= set(range(first, node.end_lineno + 1))
                yield node.name, "\n".join(line if n in kept else "" for n, line in enumerate(lines, 1))


# The folder of copies -----------------------------------------------------------------------------


def source_folder() -> Path:
    """The folder of the chapters: inside an installed wheel, otherwise beside the package in its repository."""
    packaged = PACKAGE / "_notebooks"
    return packaged if packaged.is_dir() else PACKAGE.parent / "notebooks"


def find_chapter(name: str, stems: list[str]) -> str:
    """The chapter named by `name`: its full name, its file name, or its number as in "3" or "03"."""
    check_text("chapter", name, error=CourseError)
    wanted = name.removesuffix(".ipynb")
    wanted = wanted.zfill(2) if wanted.isdigit() else wanted
    for stem in stems:
        if wanted in (stem, stem.split("_")[0]):
            return stem
    raise CourseError(f"there is no chapter {shown(name)}; choose from {', '.join(stems) or 'none'}")


def prepare(
    folder: Path, names: Sequence[str] = (), force: Sequence[str] = (), source: Path | None = None
) -> list[Prepared]:
    """Write the student copies of the chapters `names` (none given: all) into `folder`.

    A copy that the reader has changed is kept unless `force` names its chapter. Raises CourseError for a chapter that
    does not exist, and for files that cannot be read or written.
    """
    folder = Path(check_kind("folder", folder, str | Path, error=CourseError))
    source = Path(check_kind("source", source, str | Path | None, error=CourseError) or source_folder())
    names = check_kind("names", names, Sequence[str], error=CourseError)
    force = check_kind("force", force, Sequence[str], error=CourseError)
    try:
        return _prepare(folder, names, force, source)
    except (OSError, ValueError) as error:
        if isinstance(error, CourseError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise CourseError(
            f"cannot write the copies to {shown(str(getattr(error, 'filename', None) or folder))}: {reason}"
        ) from error


def _prepare(folder: Path, names: Sequence[str], force: Sequence[str], source: Path) -> list[Prepared]:
    stems = sorted(path.stem for path in source.glob("*.ipynb"))
    forced = {find_chapter(name, stems) for name in force}
    chosen = {find_chapter(name, stems) for name in names} | forced if names else set(stems)
    copies = {stem: copy_as_text(source / f"{stem}.ipynb") for stem in sorted(chosen)}

    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(folder)
    done = []
    for stem, text in copies.items():
        path = folder / f"{stem}.ipynb"
        action = decide(path, text, manifest.get(path.name), stem in forced)
        if action != "kept":
            write_whole(path, text)
            manifest[path.name] = digest(text)
        done.append(Prepared(path, action))
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return done


def decide(path: Path, text: str, written: str | None, forced: bool) -> str:
    """The action for a copy, given the hash of what was last written there (None: nothing)."""
    if not path.exists():
        return "new"
    found = hashlib.sha256(path.read_bytes()).hexdigest()  # it may not be text
    if found == digest(text):
        return "unchanged"
    if found == written:
        return "updated"
    return "replaced" if forced else "kept"


def copy_as_text(path: Path) -> str:
    return nbformat.writes(student_copy(read_notebook(path))) + "\n"


def read_notebook(path: Path) -> NotebookNode:
    """Returns the notebook. Raises CourseError for a file that is not one."""
    text = read_text(path, "the chapter", error=CourseError)
    try:
        return nbformat.reads(text, as_version=4)
    except Exception as error:  # nbformat raises many types
        raise CourseError(f"{path} is no notebook: {shown(str(error))}") from error


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, str]:
    """The manifest. An unreadable one counts as empty: then all existing files count as changed by the reader."""
    try:
        return dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step, so that an interruption leaves the old or the new one."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
