"""The player's files, and one HTML file that contains them and a recorded run."""

import html
import re
from pathlib import Path

from minillm.errors import checked, write_text
from minillm.trace import Trace, TraceFileError, trace_lines

FOLDER = Path(__file__).parent
MODULES = ("palette.js", "replay.js", "trace-player.js")  # each imports only from those before it
# The files of FOLDER that a server may send, with their content types.
FILES = {
    "index.html": "text/html; charset=utf-8",
    **dict.fromkeys(("trace-player.css", "page.css"), "text/css; charset=utf-8"),
    **dict.fromkeys((*MODULES, "feed.js", "replicas.js", "page.js"), "text/javascript; charset=utf-8"),
}
IMPORT = re.compile(r"^import .*\n", re.MULTILINE)
PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}
body {{ margin: 0 auto; padding: 16px; max-width: 1500px; background: var(--paper); color: var(--ink); }}
h1 {{ margin: 0 0 8px; font: 650 16px/1.3 system-ui, sans-serif; color: var(--soft); overflow-wrap: anywhere; }}
</style>
<main>
<h1>{title}</h1>
<trace-player>
<script type="application/jsonl">
{lines}
</script>
</trace-player>
</main>
<script type="module">
{script}
</script>
</html>
"""  # noqa: E501


@checked(error=TraceFileError)
def save_html(trace: Trace, path: str | Path, *, title: str = "a run of minillm") -> Path:
    """Write one HTML file that plays `trace` in any browser and loads nothing else; returns the path.

    Raises TraceFileError for a time that is not finite.
    """
    lines = "\n".join(trace_lines(trace)).replace("<", r"\u003c")  # no text of the trace can end the script
    script = "\n".join(IMPORT.sub("", read(name)).replace("\nexport ", "\n") for name in MODULES)
    page = PAGE.format(title=html.escape(title), style=read("trace-player.css"), lines=lines, script=script)
    return write_text(path, page, error=TraceFileError)


def read(name: str) -> str:
    """The text of one of the player's files."""
    return (FOLDER / name).read_text(encoding="utf-8")
