"""Model cards: of a run, and of a model put together of several."""

import json
import re
from importlib.metadata import version

import yaml
from huggingface_hub import ModelCard

from streamvid.training.card import save_card, write_assembled_card, write_card

CONFIG = {
    "kind": "text",
    "stage": {"encoder": {"d_model": 16}, "batch_size": 8},
    "trainer": {"output": "", "steps": 40, "seed": 3},
}


def rows(path, *numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in numbers))


def test_a_card_tells_what_was_trained_how_and_what_it_measured(tmp_path):
    output = tmp_path / "words"
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "output": str(output)}}
    rows(
        output / "log.jsonl",
        {"step": 0, "loss": 9.0, "seconds": 1.0},
        {"step": 39, "loss": 0.5, "seconds": 90.0},
    )
    rows(output / "validation.jsonl", {"step": 40, "accuracy": 0.987})
    (output / "model").mkdir()
    path = write_card(config, processes=2)
    assert path == output / "model" / "README.md"
    card = ModelCard.load(path)
    assert card.data.library_name == "diffusers" and card.data.tags == ["streamvid"]
    text = card.text
    assert text.startswith("# words\n") and "stage `text`" in text
    for part in ("40 steps, 1.5 minutes, 2 processes", f"streamvid {version('streamvid')}"):
        assert part in text
    assert "last step: loss 0.5." in text and "last validation: accuracy 0.987." in text
    (told,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(told) == config
    assert "1 process," in ModelCard.load(write_card(config, processes=1)).text


def test_a_run_that_measured_nothing_says_nothing_of_it(tmp_path):
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "output": str(tmp_path)}}
    (tmp_path / "model").mkdir()
    assert "Measured" not in write_card(config, processes=1).read_text()


def test_a_model_put_together_has_the_cards_of_its_parts(tmp_path):
    for name in ("vae", "student"):
        (tmp_path / name).mkdir()
    save_card(tmp_path / "vae", "its autoencoder", ["Seen 17 clips."])
    (tmp_path / "whole").mkdir()
    text = write_assembled_card(tmp_path / "whole", [tmp_path / "vae", tmp_path / "student"]).read_text()
    assert text.count("---\n") == 2  # one head
    order = [
        text.index(part)
        for part in ("# whole", "## its autoencoder", "Seen 17", "## student", "without a card")
    ]
    assert order == sorted(order)
