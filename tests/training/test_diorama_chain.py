"""`make diorama`, the documented command that makes the embedded model from nothing, at a tiny size to its end."""

import re
from pathlib import Path

from streamvid.models import load_pipeline
from streamvid.training import student_stage
from streamvid.training.run import train

ROOT = Path(__file__).resolve().parents[2]


def overrides(root: Path) -> dict[str, list[str]]:
    """Small networks, few steps, everything under `root`."""
    runs = {name: root / name for name in ("text", "vae", "latents", "student", "diorama")}
    encoder = "stage.encoder={d_model: 16, d_kv: 8, num_heads: 2, d_ff: 16, num_layers: 1, dropout_rate: 0.0}"
    heads = "stage.transformer.num_attention_heads=2"
    return {
        "text": [f"trainer.output={runs['text']}", "trainer.steps=2", encoder, "stage.batch_size=8"],
        "vae": [
            f"trainer.output={runs['vae']}",
            *("trainer.steps=2", "stage.vae.base_dim=4", "stage.vae.decoder_base_dim=4"),
            *("stage.frames=5", "stage.crop=32", "stage.batch_size=1"),
        ],
        "latents": [
            f"stage.vae={runs['vae']}/model",
            f"stage.output={runs['latents']}",
            *(
                "stage.shards=1",
                "stage.first_block_shards=1",
                "stage.clips_per_shard=12",
                "stage.late_share=0",
            ),
        ],
        "student": [
            f"stage.latents={runs['latents']}",
            f"stage.text={runs['text']}/model",
            f"stage.vae={runs['vae']}/model",
            f"trainer.output={runs['student']}",
            *(heads, "stage.transformer.attention_head_dim=12", "stage.transformer.text_dim=16"),
            *(
                "stage.transformer.ffn_dim=32",
                "stage.transformer.num_layers=1",
                "stage.transformer.freq_dim=16",
            ),
            *("stage.batch_size=2", "stage.first_block_batch=4", "stage.rollout_from=1", "trainer.steps=3"),
        ],
        "assemble": [
            *(f"stage.{name}={runs[name]}/model" for name in ("vae", "text", "student")),
            f"stage.output={runs['diorama']}",
        ],
    }


def test_the_whole_chain_ends_in_a_model_that_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(student_stage, "VALIDATION_CLIPS", 8)
    recipe = (ROOT / "Makefile").read_text().split("\ndiorama:")[1]
    names = re.findall(r"/diorama_(\w+)\.yaml", recipe)
    chosen = overrides(tmp_path)
    assert names == list(chosen)  # the chain that the Makefile runs
    for name in names:
        precision = (
            []
            if name in ("latents", "assemble")
            else ["trainer.mixed_precision=no", "trainer.validate_every=0"]
        )
        train(ROOT / "configs" / "train" / f"diorama_{name}.yaml", [*chosen[name], *precision])
    pipe = load_pipeline(str(tmp_path / "diorama"), "cpu", "float32")
    stream = pipe.stream("a red circle on grass", blocks=2)
    assert [chunk.frames.shape for chunk in stream] == [(9, 128, 128, 3), (12, 128, 128, 3)]
