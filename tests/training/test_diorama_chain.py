"""The documented commands that make the embedded model, at a tiny size to their end: `make diorama` and `make chain`."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from streamvid.evaluation import stage_table
from streamvid.models import load_pipeline
from streamvid.training import student_stage
from streamvid.training.run import train

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "train"
NETWORK = [
    "stage.transformer.num_attention_heads=2",
    "stage.transformer.attention_head_dim=12",
    "stage.transformer.text_dim=16",
    "stage.transformer.ffn_dim=32",
    "stage.transformer.num_layers=1",
    "stage.transformer.freq_dim=16",
]
PLAIN = ["trainer.mixed_precision=no", "trainer.validate_every=0"]


def recipe(target: str, prefix: str) -> list[str]:
    """Configurations that a target of the Makefile runs, in order."""
    lines = (ROOT / "Makefile").read_text().split(f"\n{target}:")[1].split("\n\n")[0]
    return re.findall(rf"/{prefix}(\w+)\.yaml", lines)


def overrides(root: Path) -> dict[str, list[str]]:
    """Small networks, few steps, everything under `root`."""
    runs = {name: root / name for name in ("text", "vae", "decoder", "latents", "student", "diorama")}
    encoder = "stage.encoder={d_model: 16, d_kv: 8, num_heads: 2, d_ff: 16, num_layers: 1, dropout_rate: 0.0}"
    return {
        "text": [f"trainer.output={runs['text']}", "trainer.steps=2", encoder, "stage.batch_size=8"],
        "vae": [
            f"trainer.output={runs['vae']}",
            *("trainer.steps=2", "stage.vae.base_dim=4", "stage.vae.decoder_base_dim=4"),
            *("stage.frames=5", "stage.crop=32", "stage.batch_size=1"),
        ],
        "decoder": [
            f"stage.start_from={runs['vae']}/model",
            f"trainer.output={runs['decoder']}",
            *("trainer.steps=2", "stage.frames=5", "stage.crop=32", "stage.batch_size=1"),
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
            *NETWORK,
            *("stage.batch_size=2", "stage.first_block_batch=4", "stage.rollout_from=1", "trainer.steps=3"),
        ],
        "assemble": [
            f"stage.vae={runs['decoder']}/model",
            *(f"stage.{name}={runs[name]}/model" for name in ("text", "student")),
            f"stage.output={runs['diorama']}",
        ],
    }


@pytest.fixture(scope="module")
def diorama(tmp_path_factory) -> Path:
    """`make diorama`, tiny; where its folders are."""
    root = tmp_path_factory.mktemp("diorama")
    chosen = overrides(root)
    assert recipe("diorama", "diorama_") == list(chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student_stage, "VALIDATION_CLIPS", 8)
        for name, changes in chosen.items():
            job = name in ("latents", "assemble")
            train(CONFIGS / f"diorama_{name}.yaml", [*changes, *([] if job else PLAIN)])
    return root


def test_the_whole_recipe_ends_in_a_model_that_streams(diorama):
    pipe = load_pipeline(str(diorama / "diorama"), "cpu", "float32")
    stream = pipe.stream("a red circle on grass", blocks=2)
    assert [chunk.frames.shape for chunk in stream] == [(9, 128, 128, 3), (12, 128, 128, 3)]


# --- the published chain --------------------------------------------------------------------------------------------


def chain(diorama: Path, root: Path) -> dict[str, list[str]]:
    """The same chain from the tiny model, few clips and steps, everything under `root`."""
    clips = root / "clips"

    def stage(name: str, before: str, steps: int, *more: str) -> list[str]:
        weights = [f"stage.model.weights={root / before}/model/transformer"] if before else []
        return [
            f"stage.model.folder={diorama / 'diorama'}",
            *weights,
            f"trainer.output={root / name}",
            *(
                f"trainer.steps={steps}",
                "trainer.report=none",
                "trainer.sample_every=0",
                "trainer.ema_from=0",
            ),
            *PLAIN,
            *more,
        ]

    teacher = f"stage.teacher.weights={root / 'teacher'}/model/transformer"
    prompts = f"stage.prompts={clips}/prompts.jsonl"
    small = "stage.batch_size=1"
    return {
        "clips": [
            f"stage.vae={diorama / 'vae'}/model",
            f"stage.output={clips}",
            *("stage.starts=1", "stage.later=1", "stage.clips_per_shard=3", "stage.prompts=5"),
        ],
        "teacher": stage(
            *("teacher", "", 2),
            *("stage.batch_size=2", "stage.flow.held_out=1"),
            f"stage.latents=[{clips / 'starts'}, {clips / 'later'}]",
        ),
        "causal": stage(
            *("causal", "teacher", 2, small), "stage.flow.held_out=1", f"stage.latents={clips / 'starts'}"
        ),
        "few_step": stage("few_step", "causal", 2, small, f"stage.data={clips / 'starts'}"),
        "self_forcing": stage(
            *("self_forcing", "few_step", 2, small, prompts, teacher),
            *("stage.rollout.frames=12", "stage.rollout.supervised=12"),
        ),
        # a stream of two chunks, one of them after a switch
        "long": stage(
            *("long", "self_forcing", 2, small, prompts, teacher, "stage.critic.generator_every=2"),
            *("stage.rollout.frames=21", "stage.rollout.supervised=12", "trainer.checkpoint_every=1"),
        ),
        "assemble": [
            f"stage.vae={diorama / 'vae'}/model",
            f"stage.text={diorama / 'text'}/model",
            f"stage.student={root / 'long'}/model",
            f"stage.output={root / 'diorama'}",
        ],
    }


def weights(folder: Path):
    return load_file(folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors")


def stage_file(diorama: Path, root: Path) -> Path:
    """The shipped table of stages, for this run and with the beginnings of streams only."""
    table = yaml.safe_load((ROOT / "configs" / "stages" / "diorama_chain.yaml").read_text())
    for row in table["stages"]:
        shipped = row["model"] == "diorama"
        row["model"] = str(diorama / "diorama") if shipped else row["model"].replace("runs/chain", str(root))
        row["parts"] = ["start"]
        if "clip_steps" in row:
            row["clip_steps"] = 2
    path = root / "stages.yaml"
    path.write_text(yaml.safe_dump(table))
    return path


def test_the_published_chain_ends_in_a_model_that_streams_and_a_table(diorama, tmp_path):
    chosen = chain(diorama, tmp_path)
    assert recipe("chain", "diorama_chain_") == list(chosen)
    for name, changes in chosen.items():
        train(CONFIGS / f"diorama_chain_{name}.yaml", changes)
    for before, after in pairwise(["teacher", "causal", "few_step", "self_forcing", "long"]):
        old, new = weights(tmp_path / before), weights(tmp_path / after)
        assert any(not torch.equal(old[name], new[name]) for name in old), (
            after
        )  # each stage learnt something
    pipe = load_pipeline(str(tmp_path / "diorama"), "cpu", "float32")
    assert next(pipe.stream("a red circle on grass", blocks=1)).frames.shape == (9, 128, 128, 3)

    path, output = stage_file(diorama, tmp_path), tmp_path / "stages.json"
    arguments = [str(path), "--prompts", "2", "--seeds", "0", "--output", str(output)]
    stage_table.main([*arguments, "--parts-folder", str(tmp_path / "parts")])
    found = json.loads(output.read_text())["stages"]
    assert [row.name for row in stage_table.read_rows(path)] == [row["name"] for row in found]
    assert "gain" not in found[0]["start"] and found[1]["start"]["gain"]["over"] == "teacher"
