"""Numbers in README and docs are those of the stored results."""

import importlib.util
from pathlib import Path

# loaded by path: the repository root is never on the import path
_spec = importlib.util.spec_from_file_location(
    "readme", Path(__file__).parent.parent / "benchmarks" / "readme.py"
)
readme = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(readme)


def test_pages_say_what_the_stored_results_say(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["readme", "--check"])
    assert readme.main() == 0, capsys.readouterr().out


def test_check_notices_a_changed_number(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- numbers:start -->\nold\n<!-- numbers:end -->\n")
    assert "old" not in readme.fill(page, "numbers", readme.speed_lines())
