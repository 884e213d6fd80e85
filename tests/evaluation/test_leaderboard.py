"""The leaderboard: from runs, and from a made table of methods in the real format; the page in a real browser."""

import json
import shutil

import numpy as np
import pytest
from test_report import runs  # noqa: F401 - a fixture

from streamvid.cli import main
from streamvid.errors import UserError
from streamvid.evaluation.board import marks
from streamvid.evaluation.leaderboard import board_of_runs, board_of_table
from streamvid.evaluation.method_table import COLUMNS, summary

METHODS = {"longlive": 0.80, "deep_sink": 0.95, "self_forcing": 0.949}


def make_table(path, by_prompt=True):
    """Three methods, ten prompts, two seeds: the second is the best, the third cannot be told from it."""
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 0.05, 10)
    methods = []
    for name, level in METHODS.items():
        rows = [
            {c: level + prompts[i % 10] + rng.normal(0, 0.005) for c in COLUMNS} | {"drift": 20 * (1 - level)}
            for i in range(20)
        ]
        told = {"method": name, "fps": 30.0 + len(name), "kv_bytes": 1234567, **summary(rows, 10)}
        methods.append(told if by_prompt else {k: v for k, v in told.items() if k != "by_prompt"})
    path.write_text(json.dumps({"model": "diorama", "prompts": 10, "seeds": [0, 1], "methods": methods}))
    return path


def test_best_and_what_cannot_be_told_from_it():
    prompts = [f"p{i}" for i in range(8)]
    best = dict.fromkeys(prompts, 1.0)
    equal = {p: 1.0 + (-1) ** i * 0.01 for i, p in enumerate(prompts)}
    worse = {p: 0.5 + 0.01 * i for i, p in enumerate(prompts)}
    assert marks([worse, {**best, "p0": 1.01}, equal, {}], "up") == ["", "best", "equal", ""]
    assert marks([worse, best], "down") == ["best", ""] and marks([worse, best], "") == ["", ""]
    assert marks([{}, {}], "up") == ["", ""] and marks([best, dict(best), worse], "up") == [
        "best",
        "best",
        "",
    ]


def test_a_page_from_a_table_of_methods(tmp_path, capsys):
    table, page = make_table(tmp_path / "table.json"), tmp_path / "docs" / "leaderboard.md"
    assert main(["eval", "leaderboard", "--table", str(table), "-o", str(page)]) == 0
    assert "leaderboard.md and" in capsys.readouterr().out
    text = page.read_text()
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows] == ["deep_sink", "self_forcing", "longlive"]
    assert "| end ↑ |" in header and "| drift ↓ |" in header and "| motion |" in header
    cells = {row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]] for row in rows}
    end = list(COLUMNS).index("end")
    assert cells["deep_sink"][end].startswith("**0.9") and " ± " in cells["deep_sink"][end]
    assert cells["self_forcing"][end].endswith("·") and not set("*·") & set(cells["longlive"][end])
    assert cells["longlive"][-1] == "1.23" and "- `drift` (grey levels): " in text
    assert "--prompts 10 --seeds 0 1" in text and "diorama" in text
    html = page.with_suffix(".html").read_text()
    assert "http" not in html and "Deep Forcing (2025)" in html and html.count("<tr>") == 4


def test_a_table_without_values_by_prompt_has_no_marks(tmp_path):
    board = board_of_table(make_table(tmp_path / "table.json", by_prompt=False))
    assert {cell.mark for _, _, cells in board.rows for cell in cells} == {""}
    (tmp_path / "other.json").write_text('{"methods": 3}')
    with pytest.raises(UserError, match="no table of methods"):
        board_of_table(tmp_path / "other.json")


def test_a_page_from_runs(runs):  # noqa: F811
    board = board_of_runs([runs / "one", runs / "two"])
    names = [column.name for column in board.columns]
    assert [row[0] for row in board.rows] == ["one", "two"] and "drift.sharpness" in names
    assert any(cell.mark == "best" for _, _, cells in board.rows for cell in cells if cell)
    shutil.copytree(runs / "two", runs / "three")
    results = json.loads((runs / "three" / "results.json").read_text())
    (runs / "three" / "results.json").write_text(json.dumps({**results, "protocol": "other"}))
    with pytest.raises(UserError, match="differ in protocol"):
        board_of_runs([runs / "one", runs / "three"])


def test_a_click_sorts(tmp_path):
    from playwright.sync_api import sync_playwright
    from test_report import chromium

    page_file = tmp_path / "leaderboard.md"
    main(["eval", "leaderboard", "--table", str(make_table(tmp_path / "table.json")), "-o", str(page_file)])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_context(offline=True, viewport={"width": 1400, "height": 700}).new_page()
        page.goto(page_file.with_suffix(".html").as_uri())

        def order():
            return [text.split()[0] for text in page.locator("#board tbody td:first-child").all_inner_texts()]

        assert order() == ["deep_sink", "self_forcing", "longlive"]  # by what is right after a minute
        page.locator("#board th", has_text="method").click()
        assert order() == sorted(METHODS)
        page.locator("#board th", has_text="drift").click()  # down is better: the least first
        assert order() == ["deep_sink", "self_forcing", "longlive"]
        page.screenshot(path=str(tmp_path / "board.png"))
        browser.close()
