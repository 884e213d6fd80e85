"""`streamvid train CONFIG`: build the stage a configuration names and train it."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import HFValidationError
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from streamvid.errors import UserError
from streamvid.training.card import write_card
from streamvid.training.dry_run import describe
from streamvid.training.logs import REPORTS
from streamvid.training.options import TrainerOptions
from streamvid.training.sharding import SHARDINGS
from streamvid.training.stage import Stage
from streamvid.training.timing import measure_steps, told
from streamvid.training.trainer import Trainer

STAGES = {
    "vae": "streamvid.training.vae_stage:VaeStage",
    "tiny_decoder": "streamvid.training.tiny_decoder_stage:TinyDecoderStage",
    "text": "streamvid.training.text_stage:TextStage",
    "student": "streamvid.training.student_stage:StudentStage",
    "flow": "streamvid.training.flow_stage:FlowStage",
    "few_step": "streamvid.training.few_step_stage:FewStepStage",
    "self_forcing": "streamvid.training.self_forcing:SelfForcingStage",
}
JOBS = {  # done by one call, without a training loop
    "latents": "streamvid.training.latents:encode_shards",
    "ode_pairs": "streamvid.training.ode_pairs:make_ode_pairs",
    "encode": "streamvid.training.encode:encode_folder",
    "world_clips": "streamvid.training.world_clips:make_world_clips",
    "assemble": "streamvid.training.assemble:assemble",
}
KINDS = (*STAGES, *JOBS)
TRAINER_CHOICES = {
    "mixed_precision": ("no", "bf16", "fp16"),
    "device": ("auto", "cpu"),
    "sharding": SHARDINGS,
    "on_nan": ("stop", "skip"),
    "report": REPORTS,
}
AT_LEAST_ONE = ("threads", "log_every", "checkpoint_every", "accumulate", "sample_blocks")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A training configuration: `kind`, the stage's arguments under `stage`, `TrainerOptions` under `trainer`.

    Raises:
        UserError: the file, its form, its kind or a trainer option is wrong.
    """
    if not Path(path).is_file():
        raise UserError(
            f"config = {str(path)!r} is not a file: give the path of a YAML training configuration"
        )
    try:
        config = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        plain: Any = OmegaConf.to_container(config, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} with {list(overrides)} is no configuration ({reason}): mend it") from error
    if not isinstance(plain, dict) or set(plain) - {"trainer"} != {"kind", "stage"}:
        raise UserError(f"{path}: the top-level fields must be kind, stage and trainer")
    if plain["kind"] not in KINDS:
        raise UserError(f"{path}: kind = {plain['kind']!r} is not known: choose one of {', '.join(KINDS)}")
    for name in ("stage", "trainer"):
        if not isinstance(plain.setdefault(name, {}), dict):
            raise UserError(f"{path}: {name} = {plain[name]!r} must be a mapping of options")
    if plain["kind"] in STAGES:
        _check_trainer(plain["trainer"], str(path))
    return plain


def _check_trainer(options: dict[str, Any], path: str) -> None:
    known = {f.name: str(f.type) for f in fields(TrainerOptions)}
    kinds: dict[str, Any] = {"str": str, "int": int, "float": (int, float)}
    if options.get("mixed_precision") is False:  # YAML's meaning of an unquoted no
        options["mixed_precision"] = "no"
    for name, value in options.items():
        if name not in known:
            raise UserError(
                f"{path}: trainer.{name} is not an option: choose from {', '.join(sorted(known))}"
            )
        if isinstance(value, bool) or not isinstance(value, kinds[known[name]]):
            raise UserError(f"{path}: trainer.{name} = {value!r} must be a value of type {known[name]}")
        least = 1 if name in AT_LEAST_ONE else 0
        if isinstance(value, (int, float)) and not value >= least:
            raise UserError(f"{path}: trainer.{name} = {value} must be at least {least}")
    for name in ("output", "steps"):
        if name not in options:
            raise UserError(f"{path}: trainer.{name} is missing: add it")
    for name, choices in TRAINER_CHOICES.items():
        if options.get(name, choices[0]) not in choices:
            raise UserError(
                f"{path}: trainer.{name} = {options[name]!r} is not known: choose one of {', '.join(choices)}"
            )
    if options.get("sample_every") and not options.get("sample_prompt"):
        raise UserError(
            f"{path}: trainer.sample_every needs trainer.sample_prompt: say what the video shall show"
        )


def build_stage(config: dict[str, Any]) -> Stage:
    """The stage of a configuration."""
    return _call(STAGES[config["kind"]], config)


def _call(target: str, config: dict[str, Any]) -> Any:
    module, name = target.split(":")
    function = getattr(import_module(module), name)
    try:
        inspect.signature(function).bind(**config["stage"])
    except TypeError as error:
        known = ", ".join(inspect.signature(function).parameters)
        raise UserError(f"stage of kind {config['kind']}: {error}: choose from {known}") from error
    try:
        return function(**config["stage"])
    except (OSError, HFValidationError) as error:  # a folder that is not there, a full disk
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"stage of kind {config['kind']}: {reason}: check its folders") from error


def train(
    path: str | Path,
    overrides: Sequence[str] = (),
    processes: int = 1,
    dry_run: bool = False,
    measured: int = 0,
    timing: str | Path | None = None,
) -> None:
    """Train (or resume) what the configuration at `path` describes.

    Several data-parallel processes run under torch's elastic launcher. On a CPU each uses `trainer.threads` threads:
    small models are faster with one process per core than with one process of many threads. A dry run only tells what a
    step will cost; with `measured` steps that are made and forgotten it also tells how long the run will take, and appends
    that to the JSON lines of `timing`.
    """
    config = load_config(path, overrides)
    if processes < 1:
        raise UserError(f"processes = {processes} must be at least 1")
    if dry_run:
        if config["kind"] in JOBS:
            raise UserError(
                f"{path}: kind = {config['kind']} has no training loop to describe: leave out --dry-run"
            )
        stage, options = build_stage(config), TrainerOptions(**config["trainer"])
        print("\n".join(describe(stage, options)))
        if measured:
            found = measure_steps(stage, options, measured)
            print(told(found))
            if timing is not None:
                with open(timing, "a") as file:
                    file.write(json.dumps({"config": Path(path).name, **found}) + "\n")
    elif config["kind"] in JOBS:
        extra = {"processes": processes} if config["kind"] != "assemble" and processes > 1 else {}
        _call(JOBS[config["kind"]], {**config, "stage": {**config["stage"], **extra}})
    elif processes > 1 and "LOCAL_RANK" not in os.environ:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
        command = [*launcher, "-m", "streamvid.cli", "train", str(path), *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": str(config["trainer"].get("threads", 1))}
        if subprocess.run(command, env=environment).returncode:
            raise UserError(f"training {path} on {processes} processes failed: its messages are above")
    else:
        options = TrainerOptions(**config["trainer"])
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)  # the initial weights
        trainer = Trainer(build_stage(config), options)
        trainer.run()
        if trainer.accelerator.is_main_process:
            write_card(config, trainer.accelerator.num_processes)
