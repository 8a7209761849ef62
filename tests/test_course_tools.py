"""The tools around the chapters, on small notebooks made here: canonical form, student copies, `minillm learn`."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minillm.course import notebooks, student

EXERCISE = """\
def add(a: int, b: int) -> int:
    \"\"\"The sum.\"\"\"
    ### BEGIN SOLUTION
    total = a + b
    return total
    ### END SOLUTION


print("defined")"""


def chapter(*cells: str | nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A notebook with a title; a plain string becomes a code cell."""
    made = [new_code_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    return new_notebook(cells=[new_markdown_cell("# A chapter"), *made])


def tagged(source: str, *tags: str) -> nbformat.NotebookNode:
    return new_code_cell(source, metadata={"tags": list(tags)})


def save(notebook: nbformat.NotebookNode, folder, name: str = "01_chapter.ipynb"):
    path = folder / name
    nbformat.write(notebook, path)
    return path


def first_text(path, cell: int) -> str:
    return nbformat.read(path, as_version=4).cells[cell].outputs[0].text


# Executing and canonicalising ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """A chapter with one cell of each kind, executed once: (path, problems, bytes)."""
    show = "import ipywidgets\nipywidgets.IntSlider()"
    raising = "1 / 0"
    cells = [
        "x = 6 * 7\nx",
        "print('a')\nprint(object())",
        tagged("import time\nprint(time.perf_counter_ns())", "timing", "nbval-ignore-output"),
        tagged(show, "widget", "nbval-ignore-output"),
        tagged(raising, "raises-exception"),
        "import os\nprint(os.environ['OMP_NUM_THREADS'], os.environ['HF_HUB_OFFLINE'])",
    ]
    notebook = chapter(*cells)
    notebook.metadata["widgets"] = {"state": {}}
    notebook.cells[1].metadata["execution"] = {"iopub.status.busy": "2026-01-01"}
    path = save(notebook, tmp_path_factory.mktemp("chapters"))
    return path, notebooks.rebuild(path, refresh=False), path.read_bytes()


def test_a_rebuilt_chapter_is_executed_and_without_problems(rebuilt):
    path, problems, _ = rebuilt
    cells = notebooks.code_cells(nbformat.read(path, as_version=4))
    assert problems == []
    assert [cell.execution_count for cell in cells] == [1, 2, 3, 4, 5, 6]
    assert cells[0].outputs[0].data["text/plain"] == "42"
    assert cells[1].outputs[0].text == "a\n<object object at 0x...>\n"
    assert cells[3].outputs == []  # the widget's view
    assert cells[4].outputs[0].traceback == ["ZeroDivisionError: division by zero"]
    assert cells[5].outputs[0].text == "1 1\n"


def test_a_rebuilt_chapter_is_canonical_on_disk(rebuilt):
    path, _, _ = rebuilt
    assert notebooks.check(path) == []
    assert nbformat.read(path, as_version=4).metadata == notebooks.CANONICAL_METADATA


def test_a_second_run_changes_no_byte_and_refresh_changes_the_timing(rebuilt):
    path, _, first = rebuilt
    notebooks.rebuild(path, refresh=False)
    assert path.read_bytes() == first
    notebooks.rebuild(path, refresh=True)
    assert first_text(path, 3) not in first.decode()


def measured(path, source: str) -> str:
    """What the timing cell prints after its source became `source` and the chapter was rebuilt."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source = source
    nbformat.write(notebook, path)
    assert notebooks.rebuild(path, refresh=False) == []
    return first_text(path, 1)


def test_a_timing_is_measured_again_when_its_source_changes(tmp_path):
    path = save(chapter(tagged("print(0)", "timing", "nbval-ignore-output")), tmp_path)
    assert measured(path, "print(1)") == "1\n"
    assert measured(path, "print(2)") == "2\n"


def test_a_timing_whose_output_was_cleared_is_measured_again(tmp_path):
    path = save(chapter(tagged("print(1)", "timing", "nbval-ignore-output")), tmp_path)
    notebooks.rebuild(path, refresh=False)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].outputs, notebook.cells[1].execution_count = [], None
    nbformat.write(notebook, path)
    assert measured(path, "print(1)") == "1\n"


def test_a_failing_cell_leaves_the_file_alone_and_fails_the_command(tmp_path, capsys):
    path = save(chapter("raise ValueError('as it must')"), tmp_path)
    before = path.read_bytes()
    assert notebooks.main(["--dir", str(tmp_path)]) == 1
    assert path.read_bytes() == before
    assert "as it must" in capsys.readouterr().out


def test_a_widget_without_its_tag_is_a_problem(tmp_path):
    path = save(chapter("import ipywidgets\nipywidgets.IntSlider()"), tmp_path)
    assert any("not tagged widget" in problem for problem in notebooks.rebuild(path, refresh=False))


def test_ids_are_kept_if_valid_and_unique_and_derived_otherwise():
    def make():
        notebook = chapter("a", "b", "b", "c")
        for cell, name in zip(notebook.cells[1:], ["keep-me", "twice", "twice", "not valid!"], strict=True):
            cell["id"] = name
        del notebook.cells[0]["id"]
        notebooks.give_ids(notebook.cells)
        return [cell.id for cell in notebook.cells]

    ids = make()
    assert ids == make()
    assert ids[1:3] == ["keep-me", "twice"]
    assert len(set(ids)) == 5
    assert all(notebooks.VALID_ID.fullmatch(name) for name in ids)


def executed(cell: nbformat.NotebookNode, *outputs) -> nbformat.NotebookNode:
    cell.outputs = list(outputs)
    return cell


def printed(text: str, name: str = "stdout"):
    return new_output("stream", name=name, text=text)


VIEW = new_output("display_data", data={notebooks.WIDGET_VIEW: {"model_id": "1"}, "text/plain": "IntSlider()"})

BROKEN_CELLS = {
    "is empty": new_code_cell("  "),
    "ends with ';'": new_code_cell("x;"),
    "unknown tags": tagged("x", "timings"),
    "but not nbval-ignore-output": tagged("x", "timing"),
    "neither timing nor widget": tagged("x", "nbval-ignore-output"),
    "does not raise": tagged("x", "raises-exception"),
    "raises without": executed(new_code_cell("x"), new_output("error", ename="E", evalue="", traceback=["E: "])),
    "stderr": executed(new_code_cell("x"), printed("careful", "stderr")),
    "names an absolute path": new_code_cell("open('/home/me/x')"),
    "prints an absolute path": executed(new_code_cell("x"), printed("in /tmp/x/y.py")),
    "widget view": executed(tagged("x", "nbval-ignore-output", "widget"), VIEW),
    "not canonical": executed(new_code_cell("x"), printed("<f at 0x7f0012>")),
}


@pytest.mark.parametrize("problem", BROKEN_CELLS)
def test_each_broken_cell_is_found(problem):
    notebook = notebooks.canonicalise(chapter("x"))
    assert notebooks.problems(notebook) == []
    cell = nbformat.from_dict(BROKEN_CELLS[problem])
    cell.execution_count = 2
    notebook.cells.append(cell)
    assert any(problem in found for found in notebooks.problems(notebook))


@pytest.mark.parametrize("text", ["see https://x.org/usr/a", "tokens/s", "a/home/b", "../work/x", "1/2", "/", "</opt>"])
def test_what_only_looks_like_a_path_is_no_problem(text):
    assert not notebooks.ABSOLUTE_PATH.search(text)


def break_metadata(notebook):
    notebook.metadata["widgets"] = {}


def break_ids(notebook):
    notebook.cells[1]["id"] = notebook.cells[0].id


def break_counts(notebook):
    notebook.cells[1].execution_count = 5


def break_title(notebook):
    notebook.cells[0].source = "no title"


@pytest.mark.parametrize("breaking", [break_metadata, break_ids, break_counts, break_title])
def test_each_broken_notebook_is_found(breaking):
    notebook = notebooks.canonicalise(chapter("x"))
    breaking(notebook)
    assert len(notebooks.problems(notebook)) == 1


def test_an_unknown_chapter_and_a_folder_without_any_are_named(tmp_path, capsys):
    save(chapter("x"), tmp_path)
    assert notebooks.main(["09", "--dir", str(tmp_path)]) == 2
    assert "no chapter 09" in capsys.readouterr().err
    assert notebooks.main(["--dir", str(tmp_path / "missing")]) == 2
    assert "no notebooks in" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"{", b"[]", b'{"nbformat": 4}', b"null"])
def test_what_is_no_notebook_is_told_so(tmp_path, capsys, content):
    (tmp_path / "01_broken.ipynb").write_bytes(content)
    assert notebooks.main(["--check", "--dir", str(tmp_path)]) == 2
    assert "01_broken.ipynb" in capsys.readouterr().err
    with pytest.raises(student.CourseError, match="01_broken"):
        student.prepare(tmp_path / "learn", source=tmp_path)


# Student copies -----------------------------------------------------------------------------------


def test_a_solution_becomes_one_line_that_names_the_function():
    expected = EXERCISE.split("    ### BEGIN")[0] + '    raise NotImplementedError("write add")\n\n\nprint("defined")'
    assert student.without_solutions(EXERCISE) == expected


def test_methods_keep_their_indentation_and_source_without_markers_is_untouched():
    source = "class A:\n    def f(self):\n        ### BEGIN SOLUTION\n        return 1\n        ### END SOLUTION"
    expected = 'class A:\n    def f(self):\n        raise NotImplementedError("write f")'
    assert student.without_solutions(source) == expected
    assert student.without_solutions("a = 1\n\nb = 2  ") == "a = 1\n\nb = 2  "


BEGIN, END = f"    {student.BEGIN}\n", f"    {student.END}\n"


@pytest.mark.parametrize(
    "body",
    [BEGIN, END, BEGIN + BEGIN + END, BEGIN + END + END],
    ids=["no end", "no begin", "nested", "two ends"],
)
def test_markers_without_a_partner_are_refused(body):
    with pytest.raises(student.CourseError, match="SOLUTION"):
        student.without_solutions("def f():\n" + body)


def test_a_guess_outside_a_function_is_unset():
    source = "### BEGIN SOLUTION\nmy_guess = 3 * 4  # ms\nother = 'a'\n### END SOLUTION\nprint(my_guess)"
    assert student.without_solutions(source) == "my_guess = None  # ms\nother = None\nprint(my_guess)"


@pytest.mark.parametrize("source", ["print(1)", "x += 1", "import os"])
def test_other_solutions_outside_a_function_are_refused(source):
    with pytest.raises(student.CourseError, match="outside a function"):
        student.without_solutions(f"### BEGIN SOLUTION\n{source}\n### END SOLUTION")


def test_an_indented_solution_below_no_function_is_refused():
    with pytest.raises(student.CourseError, match="below no function"):
        student.without_solutions("if True:\n    ### BEGIN SOLUTION\n    x = 1\n    ### END SOLUTION")


def test_a_student_copy_is_cleared_and_leaves_the_chapter_alone():
    notebook = notebooks.canonicalise(chapter(executed(new_code_cell(EXERCISE), printed("defined\n"))))
    copy = student.student_copy(notebook)
    assert student.has_solution(notebook.cells[1].source)
    assert not student.has_solution(copy.cells[1].source)
    assert (copy.cells[1].outputs, copy.cells[1].execution_count) == ([], None)
    assert (len(notebook.cells[1].outputs), notebook.cells[1].execution_count) == (1, 1)
    assert (copy.cells[0], copy.metadata) == (notebook.cells[0], notebook.metadata)


def test_a_cell_that_may_raise_has_the_tag_in_the_copy():
    sources = ["checks.square(square)", "checks.needs(square)\nx = square(3)", "checks.prediction('x', guess, x)", "1"]
    copy = student.student_copy(chapter(*sources))
    assert [notebooks.tags(cell) for cell in copy.cells] == [[], ["raises-exception"], [], ["raises-exception"], []]
    timing = student.student_copy(chapter(tagged("checks.prediction('x', guess, x)", "timing"))).cells[1]
    assert notebooks.tags(timing) == ["raises-exception", "timing"]


def test_run_all_goes_on_below_a_check_that_fails(tmp_path):
    """Of the copy of a chapter; the reader sees one line."""
    cells = ["from minillm import checks", "### BEGIN SOLUTION\nguess = 3\n### END SOLUTION"]
    cells += ["checks.prediction('x', guess, 3)", "print('here')"]
    notebook = notebooks.execute(student.student_copy(chapter(*cells)), tmp_path)
    assert notebook.cells[3].outputs[0].traceback == ["✗ x: write your guess first, then run this cell."]
    assert notebook.cells[4].outputs[0].text == "here\n"


@pytest.mark.parametrize("head", ["def f():", "async def f():", "@cache\ndef f():", "class f:\n  def g(self):"])
def test_a_solution_is_found_by_its_name(tmp_path, monkeypatch, head):
    body = "    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION\n"
    source = f"import json\nx = 1\n{head}\n{body}\n\ndef g():\n    pass"
    save(chapter(source, "### BEGIN SOLUTION\nguess = 3\n### END SOLUTION"), tmp_path)
    monkeypatch.setattr(student, "source_folder", lambda: tmp_path)
    found = student.solution("f")
    assert found.source.rstrip() == f"import json\n\n{head}\n{body}".split("    ### END")[0].rstrip()
    assert found.place.startswith("01_chapter, cell ")
    assert student.solution("g") is student.solution("guess") is None


# minillm learn ------------------------------------------------------------------------------------


@pytest.fixture
def course(tmp_path):
    """Two chapters and the folder for the reader's copies."""
    source = tmp_path / "notebooks"
    source.mkdir()
    save(chapter("1"), source, "01_one.ipynb")
    save(chapter("2"), source, "02_two.ipynb")
    return source, tmp_path / "learn"


def learn(course, *names: str, force: tuple[str, ...] = ()) -> dict[str, str]:
    source, folder = course
    return {done.path.name: done.action for done in student.prepare(folder, names, force, source)}


def test_learn_writes_all_chapters_and_then_nothing(course):
    assert learn(course) == {"01_one.ipynb": "new", "02_two.ipynb": "new"}
    assert learn(course) == {"01_one.ipynb": "unchanged", "02_two.ipynb": "unchanged"}


@pytest.mark.parametrize("name", ["2", "02", "02_two", "02_two.ipynb"])
def test_learn_finds_a_chapter_by_number_or_name(course, name):
    assert learn(course, name) == {"02_two.ipynb": "new"}


def test_learn_keeps_what_the_reader_changed_until_forced(course):
    learn(course)
    mine = course[1] / "01_one.ipynb"
    save(chapter("my work"), course[1], mine.name)
    before = mine.read_bytes()
    assert learn(course)[mine.name] == "kept"
    assert learn(course, force=("02",))[mine.name] == "kept"
    assert mine.read_bytes() == before
    assert learn(course, force=("01",)) == {"01_one.ipynb": "replaced", "02_two.ipynb": "unchanged"}
    assert mine.read_bytes() != before
    assert learn(course)[mine.name] == "unchanged"


def test_learn_updates_a_copy_the_reader_has_not_touched(course):
    learn(course)
    save(chapter("a better 1"), course[0], "01_one.ipynb")
    assert learn(course) == {"01_one.ipynb": "updated", "02_two.ipynb": "unchanged"}
    assert "a better 1" in (course[1] / "01_one.ipynb").read_text()


def test_learn_keeps_the_readers_work_when_the_chapter_changes_too(course):
    learn(course)
    save(chapter("a better 1"), course[0], "01_one.ipynb")
    save(chapter("my work"), course[1], "01_one.ipynb")
    assert learn(course)["01_one.ipynb"] == "kept"


@pytest.mark.parametrize("manifest", ["", "[1, 2]", "{broken", None])
def test_learn_without_a_readable_manifest_takes_a_different_file_for_the_readers(course, manifest):
    learn(course)
    save(chapter("a better 1"), course[0], "01_one.ipynb")
    path = course[1] / student.MANIFEST
    path.unlink() if manifest is None else path.write_text(manifest)
    assert learn(course) == {"01_one.ipynb": "kept", "02_two.ipynb": "unchanged"}


def test_learn_writes_a_deleted_copy_again(course):
    learn(course)
    (course[1] / "01_one.ipynb").unlink()
    assert learn(course)["01_one.ipynb"] == "new"


def test_learn_names_the_chapters_there_are(course):
    with pytest.raises(student.CourseError, match=r"no chapter '7'; choose from 01_one, 02_two"):
        learn(course, "7")


def test_a_force_alone_still_prepares_all_chapters_but_beside_names_only_those(course):
    assert set(learn(course, "01", force=("01",))) == {"01_one.ipynb"}
    assert set(learn(course, force=("01",))) == {"01_one.ipynb", "02_two.ipynb"}
