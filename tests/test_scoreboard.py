"""The scoreboard: a row for each chapter, numbers from records alone, nothing told before its chapter."""

import re

import pytest

from minillm.bench import chapter_scores, figures, ladder, ladder_report, recorded, scoreboard
from minillm.bench.chapter_scores import CHAPTERS, SERVER
from minillm.course import notebooks
from minillm.errors import ConfigError
from minillm.viz import PictureError, Score, Scoreboard


def rung(label: str, over_first: float, computed: int = 190, requests: int = 10, memory=(100.0, 25.0)) -> dict:
    """A record as `ladder_report` makes one, of requests with 10 tokens in and 10 out each."""
    reserved, wasted = ({"mean": value, "peak": value} for value in memory)
    return {
        "label": label,
        "requests": requests,
        "prompt_tokens": 10 * requests,
        "output_tokens": 10 * requests,
        "output_tokens_per_second": 50.0 * over_first,
        "over_first": over_first,
        "computed_tokens": computed,
        "cache": {"reserved": reserved, "wasted": wasted},
    }


RUNGS = {
    "naive": rung("naive", 1.0, computed=380, requests=4, memory=(0, 0)),
    "cache": rung("cache", 3.0),
    "static": rung("static batches", 6.0, computed=380),
    "dynamic": rung("dynamic batches", 5.0, computed=760),
    "continuous": rung("continuous, rows", 10.0),
    "paged": rung("paged, in torch", 20.0, memory=(100.0, 4.0)),
    "kernels": rung("paged, in C++", 40.0, memory=(100.0, 4.0)),
    "processes": rung("two processes", 44.0, memory=(100.0, 4.0)),
    "shared": rung("prefix shared", 1.0) | {"over_first": None, "cache": {"reserved": None, "wasted": None}},
}
LADDER = {"machine": "a machine", "date": "2026-11-30", "parts": {"small": {"label": "small", "requests": 10}}}
LADDER["parts"]["small"]["rungs"] = RUNGS
SERVED = {"requests": 7, "tokens": 900, "throughput_ratio": 0.5}
SERVED |= {"turns": [{"server": {"seconds": seconds}} for seconds in (1.0, 3.0, 9.0)]}
SERVE = {"parts": {"small": SERVED}}


def board(today: int | None = None, ladder: dict = LADDER, serve: dict = SERVE) -> Scoreboard:
    return scoreboard(today, "small", ladder=ladder, serve=serve)


def test_there_is_a_row_for_each_chapter_and_each_rung_of_the_ladder_is_in_one():
    assert [chapter.number for chapter in CHAPTERS] == list(range(1, 12))
    paths = notebooks.chapters([])
    written = {int(path.stem[:2]) for path in paths if path.stem[:2].isdigit()}
    assert written - {12} <= {chapter.number for chapter in CHAPTERS}  # chapter 12 is past the one card of the ladder
    named = [name for chapter in CHAPTERS for name in chapter.rungs if name != SERVER]
    assert named == ["naive", "cache", "static", "dynamic", "continuous", "paged", "kernels", "processes"]
    assert all(chapter.rungs or chapter.note for chapter in CHAPTERS)


def test_the_rungs_named_are_those_that_the_ladder_has(monkeypatch):
    arguments = ladder.parse_arguments(["--shape", "storyteller", "--peers", "none"])
    monkeypatch.setattr(ladder, "load_decoder", lambda *given, **named: None)
    monkeypatch.setattr(ladder, "Alone", Stand)
    monkeypatch.setattr(ladder, "Rows", Stand)
    monkeypatch.setattr(ladder, "Paged", Stand)
    monkeypatch.setattr(ladder, "read_config", lambda folder: None)
    rungs = list(up_to_the_prefix(ladder.make_rungs("storyteller", None, [], None, arguments)))
    assert rungs == [name for chapter in CHAPTERS for name in chapter.rungs if name != SERVER]


class Stand:
    """Takes the place of a rung that would load a model."""

    def __init__(self, *given, **named):
        pass

    def placed(self, name: str, label: str, before: str | None, is_aside: bool = False) -> str:
        return name


def up_to_the_prefix(rungs):
    for name in rungs:
        yield name
        if name == "processes":
            return


def test_rows_follow_from_the_records():
    scores = {score.chapter: score for score in board().scores}
    assert scores[1] == Score(
        1, "generation", 50.0, 1 - 76 / 380, None, 1.0, note="tokens/s of the first 4 requests only"
    )
    assert (scores[3].slots_wasted, scores[3].memory_wasted, scores[3].factor) == (0, 0.25, 3.0)
    assert (scores[5].slots_wasted, scores[5].factor) == (0.75, 5.0)
    assert scores[5].note == "dynamic batches; before that static batches 6.0x"
    assert scores[8].memory_wasted == 0.04
    assert scores[9].factor == 44.0 and scores[9].note.startswith("two processes; before that paged, in C++ 40.0x")


def test_a_chapter_without_a_rung_stands_where_the_one_before_has_ended():
    scores = {score.chapter: score for score in board().scores}
    for chapter, factor in ((2, 1.0), (4, 3.0), (6, 5.0), (11, 20.0)):
        assert (scores[chapter].factor, scores[chapter].is_own) == (factor, False)
        assert scores[chapter].tokens_per_second is None and "no rung of its own" in scores[chapter].note


def test_the_server_is_measured_beside_the_engine_that_it_serves():
    server = board().scores[9]
    assert server.factor == 0.5 * 40.0 and server.is_own
    assert server.tokens_per_second is server.slots_wasted is server.memory_wasted is None
    assert "7 other requests" in server.note and "300 tokens/s, 50%" in server.note


def test_what_is_not_recorded_is_said_and_not_made_up(monkeypatch):
    monkeypatch.setattr(recorded, "FOLDER", None)
    monkeypatch.setattr(chapter_scores.recorded, "latest", lambda kind, part: None)
    with pytest.raises(ConfigError, match="no ladder of 'small' is recorded"):
        scoreboard(shape="small")
    scores = {score.chapter: score for score in scoreboard(shape="small", ladder=LADDER).scores}
    assert (scores[10].note, scores[10].factor, scores[10].is_own) == ("no run of bench serve is recorded", 44.0, False)
    few = {name: each for name, each in RUNGS.items() if name not in ("kernels", "processes")}
    part = LADDER["parts"]["small"] | {"rungs": few}
    scores = {score.chapter: score for score in board(ladder=LADDER | {"parts": {"small": part}}).scores}
    assert scores[9].note == "not in this record: kernels, processes" and scores[9].tokens_per_second is None
    assert scores[10].note == "not in this record: kernels" and scores[10].factor == 20.0


def test_today_is_lit_and_what_comes_is_not_told():
    picture = board(today=5)
    lines = picture.text().splitlines()
    (lit,) = [line for line in lines if line.startswith(">")]
    assert "static, dynamic batches" in lit and lit.split()[-2] == "5.0x"
    assert any(line.endswith("paged KV cache") for line in lines)
    assert "20.0x" not in picture.text() and "chapter 8" not in picture.text() and "chapter 8" not in picture.alt()
    (axes,) = picture.figure().axes
    assert [label.get_fontweight() == "bold" for label in axes.get_yticklabels()] == [n == 5 for n in range(1, 12)]
    told = [text.get_text() for text in axes.texts]
    assert "5.0x" in told and "20.0x" not in told


def test_bars_are_as_long_as_their_factors():
    (axes,) = board().figure().axes
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert ends == pytest.approx([3, 3, 5, 5, 10, 20, 44, 20, 20])  # factors of 1 have none
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize(
    ("scores", "today", "says"),
    [
        ([], None, "at least one"),
        ([Score(2, "a"), Score(1, "b")], None, "let them rise"),
        ([Score(1, "a")], 2, "today is chapter 2"),
        ([Score(1, "a", factor=0.0)], None, "above 0"),
        ([Score(1, "a", slots_wasted=1.5)], None, "from 0 to 1"),
        ([Score(1, "a", tokens_per_second=float("nan"))], None, "above 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(scores, today, says):
    with pytest.raises(PictureError, match=says):
        Scoreboard(scores, today=today)


def test_a_single_row_is_drawn():
    picture = Scoreboard([Score(1, "generation", 58.5, 0.98, None, 1.0)], today=1, source="a machine")
    assert picture.png() and picture.text().endswith("a machine")
    assert "98%" in picture.text() and "–" in picture.text()


# --- what the README shows -------------------------------------------------------------------------------------------

ROOT = figures.FOLDER.parent
READMES = {
    path: " ".join((ROOT / path).read_text().split())
    for path in ("README.md", "minillm/bench/README.md", "minillm/serving/README.md")
}
README = READMES["minillm/bench/README.md"]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_the_readme_shows_the_recorded_run(name):
    committed = figures.FOLDER / name
    assert committed.is_file() and figures.FIGURES[name]().svg() == committed.read_bytes(), "run: make figures"
    assert any(f"figures/{name})" in readme for readme in READMES.values())


def test_the_server_s_readme_quotes_the_recorded_run():
    record = recorded.latest("serve", part="storyteller")
    part, readme = record["parts"]["storyteller"], READMES["minillm/serving/README.md"]
    assert f"With {part['streams']} streams the server reaches {part['throughput_ratio']:.0%}" in readme
    assert record["date"] in readme


def test_the_readme_s_links_lead_to_files():
    for path in READMES | {"minillm/README.md": ""}:
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / path).read_text())
        here = [link for link in links if not link.startswith("http")]
        assert here and [link for link in here if not (ROOT / path).parent.joinpath(link).exists()] == []


def test_the_readme_quotes_the_recorded_ladder():
    record = recorded.latest("ladder", part="storyteller")
    part = record["parts"]["storyteller"]
    rungs = part["rungs"]
    assert record["date"] in README and f"{part['requests']} requests" in README
    for name, rung in rungs.items():
        if rung["over_first"] is not None and not name.startswith("transformers"):
            over = f"{rung['over_before']['median']:.2f}" if rung["over_before"] else "–"
            wasted = chapter_scores.memory_wasted(rung)
            cells = [rung["label"], f"{rung['output_tokens_per_second']:,.0f}", over, f"{rung['over_first']:.1f}"]
            cells += [f"{rung['steps']:,}", f"{rung['computed_tokens']:,}"]
            assert f"| {' | '.join(cells)} | {'–' if wasted is None else f'{wasted:.0%}'} |" in README
    for name in ("processes", "transformers_cb"):
        assert f"{rungs[name]['over_transformers_static']['median']:.1f} times" in README
    errors = part["predicted"]["median_error"], part["predicted"]["median_error_of_seconds"]
    assert f"a median error of {errors[0]:.1%}, its seconds one of {errors[1]:.1%}" in README


def test_guesses_stand_beside_their_rungs():
    part = recorded.latest("ladder", part="storyteller")["parts"]["storyteller"]
    picture = ladder_report.waterfall(part, guesses={"cache": 10.0, "paged": None})
    assert picture.guesses == {"cache": 10.0}
    assert ladder_report.waterfall(part).guesses == {}
