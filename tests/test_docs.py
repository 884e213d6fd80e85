"""What the documents say: their commands exist, their Python runs, their links lead somewhere."""

import re
import shlex
from pathlib import Path

import imageio.v3 as imageio
import pytest

from streamvid.cli import build_parser, main
from streamvid.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURES = ROOT / "docs" / "pictures"
OURS = ("streamvid ", ".venv/bin/streamvid ")


def code_lines(document: Path) -> list[str]:
    """Lines of code blocks, joined where one ends with a backslash."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


COMMANDS = [
    pytest.param(line, id=f"{document.name}: {line[:50]}")
    for document in DOCUMENTS
    for line in code_lines(document)
    if line.startswith(OURS)
]


def test_the_documents_have_commands():
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_exists(line):
    _, *arguments = shlex.split(line.replace("…", "..."), comments=True)
    try:
        build_parser().parse_args(arguments)
    except SystemExit as end:
        assert end.code == 0 and "--help" in arguments


@pytest.mark.parametrize("line", COMMANDS)
def test_files_of_this_repository_that_a_command_names_exist(line):
    for word in shlex.split(line, comments=True):
        if re.match(r"(examples|configs|tests|docs)/", word) and not set("*…") & set(word):
            assert (ROOT / word).exists(), word


def test_a_command_that_does_not_exist_is_found_out():
    with pytest.raises(UserError, match="--sead"):
        build_parser().parse_args(["generate", "a fox [1s]", "--sead", "1"])


def test_the_guide_to_streams_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "streams.md").read_text()
    names: dict = {}
    for kind, block in re.findall(r"^```(python|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if kind == "python":
            exec(block, names)
            continue
        for line in block.splitlines():
            assert main(shlex.split(line)[1:]) == 0
    assert names["again"].block == 5
    for made in ("cube.stream", "small.stream", "first.png"):
        assert (tmp_path / made).exists()
    assert len(imageio.imread(tmp_path / "from_picture.mp4")) == len(
        imageio.imread(tmp_path / "continued.mp4")
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        if PICTURES in linked.parents and not PICTURES.exists():
            continue  # pictures come with the weights
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target  # nothing outside the repository
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}, target


def test_make_targets_that_the_readme_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake (\w+)", (ROOT / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def python_blocks(document: Path) -> list[str]:
    """Python that is not marked as one that cannot run here."""
    text = re.sub(r"<!-- not run: .*? -->\n```python\n.*?^```", "", document.read_text(), flags=re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize("name", ["README.md", "docs/pipeline.md"])
def test_python_runs(name, tmp_path, monkeypatch):
    """One block after the other, in one interpreter."""
    pytest.importorskip("torchao")
    monkeypatch.chdir(tmp_path)
    shown: list = []
    names = {"show": shown.append, "__name__": name}
    blocks = python_blocks(ROOT / name)
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    if name == "README.md":
        assert len(shown) == 7
    else:
        assert names["receipt"].chunk == 1
        assert len(names["videos"][0]) == len(names["video"]) == 21
        same = [a.tobytes() == b.tobytes() for a, b in zip(names["videos"][0], names["video"], strict=True)]
        assert all(same)  # the modular pipeline and the standard one


def test_tests_that_the_guide_to_evaluation_names_exist():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / "evaluation" / file).read_text(), (file, test)
