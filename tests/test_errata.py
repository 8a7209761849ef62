"""The table at the top of the errata repeats what its cells print. `python tests/test_errata.py` writes it."""

import json
import re
from pathlib import Path

ERRATA = Path(__file__).parents[1] / "notebooks" / "errata.ipynb"
LINE = re.compile(r"(.+?): the chapter says (.+?); computed (.+); the chapter is (right|wrong)(?:, (.+) what is true)?")
HEADER = ["| section | what | the chapter says | computed | who is right |", "|---|---|---|---|---|"]


def comparisons(cell: dict) -> list[tuple[str, ...]]:
    """What a cell has compared: what, the chapter's value, ours, who is right."""
    printed = "".join("".join(output.get("text", "")) for output in cell.get("outputs", []))
    found = []
    for match in filter(None, map(LINE.fullmatch, printed.splitlines())):
        *said, who, times = match.groups()
        who = "the chapter" if who == "right" else "the course" + (f"; the chapter says {times} that" if times else "")
        found.append(
            (*(re.sub(r"<[^<>]+>", lambda tag: f"`{tag[0]}`", each).replace("|", r"\|") for each in said), who)
        )
    return found


def table(notebook: dict) -> str:
    """A row for each comparison, with a link to the heading that it stands under."""
    rows, section, heading = list(HEADER), "", ""
    for cell in notebook["cells"]:
        for line in "".join(cell["source"]).splitlines() if cell["cell_type"] == "markdown" else ():
            section = line[3:] if line.startswith("## ") else section
            heading = line[4:] if line.startswith("### ") else heading
        where = section.split()[0] if section[:1].isdigit() else section
        rows += [
            f"| [{where}](#{heading.replace(' ', '-')}) | {' | '.join(row)} |"
            for row in (comparisons(cell) if cell["cell_type"] == "code" else ())
        ]
    return "\n".join(rows)


def test_the_table_says_what_the_cells_computed():
    notebook = json.loads(ERRATA.read_text(encoding="utf-8"))
    (top,) = ("".join(cell["source"]) for cell in notebook["cells"] if cell["id"] == "table")
    assert top == table(notebook), "run python tests/test_errata.py"
    assert top.count("\n") > 70 and "the chapter says 15.3 times that" in top


def test_every_cell_compares_and_every_section_is_there():
    notebook = json.loads(ERRATA.read_text(encoding="utf-8"))
    silent = [cell["id"] for cell in notebook["cells"] if cell["cell_type"] == "code" and not comparisons(cell)]
    assert silent == ["setup"]
    text = table(notebook)
    assert all(f"[5.{section}](#" in text for section in range(1, 8))
    headings = re.findall(r"^### (.+)$", "\n".join("".join(cell["source"]) for cell in notebook["cells"]), re.M)
    assert len(set(headings)) == len(headings)
    assert set(re.findall(r"\(#(.+?)\)", text)) <= {heading.replace(" ", "-") for heading in headings}


def write() -> None:
    """Put the table of the committed outputs into its cell."""
    notebook = json.loads(ERRATA.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["id"] == "table":
            cell["source"] = table(notebook).splitlines(keepends=True)
    ERRATA.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
