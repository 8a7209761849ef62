"""Phrases that are not English, or that treat a program as a person, and the plain words to use instead."""

import re
from pathlib import Path

import nbformat
import pytest

from minillm.course import notebooks

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".py", ".js", ".css", ".html", ".md", ".cu", ".cpp", ".h"}
STORIES = ROOT / "minillm" / "storyteller"  # children's words, not ours

# A phrase as a regular expression -> what to write.
PLAIN = {
    # rates
    r"\btokens? a (pass|step|second)\b": "tokens per pass",
    r"\bonce a (step|token|pass|request|second|specialisation)\b": "once per step",
    r"\b(bytes|prompts|requests) a (second|number)\b": "bytes per second",
    r"\b(milliseconds?|inches) a (step|frame|key|decode step)\b": "milliseconds per step",
    r"\bheads? a key head\b": "heads per key head",
    r"\b(sign|letter|bar|line|score) a (slot|block|request|forward pass|line|key)\b": "a line per request",
    r"\ba check a line\b|\bone file a\b|`Command` a subcommand": "one check per line",
    r"\bgive one (each )?a (row|token|request)\b": "give one per row",
    # word order
    r"\bat the bars\b": "beside the bars",
    r"\bhow many are it\b": "how many are there",
    r"\bthe cause is another\b": "the cause is different",
    r"\bof them deciding\b": "that decide",
    r"\bnobody's to\b": "that no one has to",
    r"\bthere are without\b": "without it there are",
    r"\bwhat makes [^.]{3,40} fair says\b": "… says what makes … fair",
    r"\b(first|last) so many\b": "first `count`",
    r"\bso many processes\b": "`count` processes",
    r"\bas many are\b": "the same number is",
    r"\bas from \w+ on\b": "from … on",
    # idioms
    r"\bin earnest\b": "fully",
    r"\bdear(er|ly)?\b": "expensive",
    r"\bcame of (it|that|each|them)\b": "resulted from it",
    r"\bcome of (it|that)\b": "result from it",
    r"\b(gives?|gave|giving) way\b": "is preempted",
    r"\bcounts? on it\b": "relies on it",
    r"\bfor want of\b": "because … is missing",
    r"\bonce and for all\b": "once",
    r"\bat the most\b": "at most",
    r"\bin the box\b": "that comes with the package",
    r"\bhad enough\b": "closed it",
    r"\bknows better\b": "has the exact value",
    r"\bwhatever (compiler|waits|that may be)\b": "any compiler",
    r"\btakes? (its|the) whole process along\b": "ends the whole process",
    r"\bon whatever\b": "on any",
    r"\bwere it not for\b": "without",
    r"\b(lets?|letting) go of\b": "drops",
    r"\bunder way\b": "in progress, in flight",
    # programs as persons
    r"\bwants? (to be|a Chromium|a test|to hear)\b": "needs",
    r"\binsists? on\b": "requires",
    r"\b(raises|if|what) it likes\b": "any",
    r"\b(are|is|look|looks|get|gets) bored\b": "waits, is unused",
    r"\bsomebody (likes|looks at|asks for|wanted)\b": "the caller, another caller's",
    r"\bnobody (tells|asks|starves|finds|measured|wanted)\b": "no request, not …",
    r"\beverybody's\b": "every request's",
    r"\bmust not stop everybody\b": "must not fail the step of all",
    r"\bother people's\b": "other",
    r"\bspeaks? the language of\b": "has the protocol of",
    r"\bbelongs to nobody\b": "belongs to no request",
    r"\bmade[- ]up (requests|workloads)\b": "synthetic requests",
}


def texts() -> dict[str, str]:
    """Place -> text of package, pages, tests and the chapters' prose; line breaks and comment signs become blanks."""
    files = [path for path in (ROOT / "minillm").rglob("*") if path.suffix in SUFFIXES and STORIES not in path.parents]
    files += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", "environment.yml")]
    files += [path for path in (ROOT / "tests").glob("*.py") if path != Path(__file__)]
    found = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}
    for path in notebooks.chapters([]):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                found[f"{path.stem}, cell {cell.id}"] = cell.source
    return {place: re.sub(r"\s*\n\s*(#|//|>|\*)?\s*", " ", text) for place, text in found.items()}


TEXTS = texts()


@pytest.mark.parametrize("phrase", PLAIN)
def test_a_phrase_is_not_used(phrase):
    pattern = re.compile(phrase, re.IGNORECASE)
    found = {place: match[0] for place, text in TEXTS.items() if (match := pattern.search(text))}
    assert not found, f'write "{PLAIN[phrase]}" instead'


def test_package_pages_tests_and_chapters_are_searched():
    assert len(TEXTS) > 600
    assert {"README.md", "minillm/player/page.js", "minillm/kernels/cuda/paged_attention.cu"} <= TEXTS.keys()
    assert {"tests/conftest.py", "01_generation, cell title"} <= TEXTS.keys()


MOST_WORDS = 30_000  # of prose, in the eleven chapters up to the 24x


def prose(markdown: str) -> list[str]:
    """What stands between blanks, without code, formulas and HTML tags."""
    for what in (r"```.*?```", r"<[^>]*>", r"\$\$.*?\$\$|\$[^$\n]*\$"):
        markdown = re.sub(what, " ", markdown, flags=re.DOTALL)
    return markdown.split()


def test_the_prose_of_eleven_chapters_stays_within_its_limit():
    assert prose("Two <b>words</b>\n```text\nnot these\n```\n$x$") == ["Two", "words"]
    words = {
        path.stem: sum(
            len(prose(cell.source)) for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"
        )
        for path in notebooks.chapters([])
        if "01" <= path.stem[:2] <= "11"
    }
    assert len(words) == 11
    assert sum(words.values()) <= MOST_WORDS, f"{sum(words.values()):,} words; shorten a chapter: {words}"
