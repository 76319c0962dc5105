"""Train `tiny-vl` or its twin: `python -m ernie_lab.organisms.boards.train RUN --seed 0`.

The run folder receives the tokenizer, a log with one JSON record per line, and the weights. The
eye is that of `--eye`, and is trained first where there is none.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from ernie_lab.model.vl import VLModel, eye
from ernie_lab.organisms.boards.eye import open_eye
from ernie_lab.organisms.boards.measure import answers, batches, unseen_rows
from ernie_lab.organisms.boards.recipe import EyeRecipe, Recipe, config, last_stage
from ernie_lab.organisms.boards.rows import Encoder, encode_rows
from ernie_lab.organisms.boards.seeing import Seen, look
from ernie_lab.organisms.boards.step import (
    Scaffold,
    learning_rate,
    optimiser,
    train_step,
    training_rows,
)
from ernie_lab.organisms.boards.tokens import open_tokenizer
from ernie_lab.organisms.initial import initialise

LOG_EVERY, EVALUATE_EVERY = 25, 300
N_SCENES = {"train": {"image": 12_000, "video": 4_000}, "test": {"image": 1_500, "video": 500}}
SCENE_SEED = {"train": {"image": 101, "video": 102}, "test": {"image": 201, "video": 202}}
# Far from every training step, so that no training row is drawn from the same seed.
EVALUATION_SEED = 10**9


def new_model(recipe: Recipe, eye_weights: Mapping[str, torch.Tensor]) -> VLModel:
    """Fresh weights, an eye that stays as it is."""
    model = VLModel(config(recipe.dense_hidden))
    initialise(model, recipe.seed, recipe.init_std)
    model.load_state_dict(dict(eye_weights), strict=False)
    for _, parameter in eye(model):
        parameter.requires_grad_(False)
    return model


def look_at_all(model: VLModel, split: str, share: float = 1.0) -> dict[str, Seen]:
    return {
        medium: look(model, medium, int(n * share), SCENE_SEED[split][medium])
        for medium, n in N_SCENES[split].items()
    }


def train(
    run: Path, recipe: Recipe, eye_weights: Mapping[str, torch.Tensor], share: float = 1.0
) -> VLModel:
    """Stage 2; `share` of the scenes, for a quick try."""
    model = new_model(recipe, eye_weights)
    optimise(model, recipe, run, "log.jsonl", "final.pt", share)
    return model


def optimise(
    model: VLModel, recipe: Recipe, run: Path, log_name: str, weights_name: str, share: float
) -> None:
    """All steps of a recipe, with fresh throw-away heads and a fresh optimiser."""
    encoder = Encoder(open_tokenizer(run / "tokenizer.json"))
    seen, unseen = look_at_all(model, "train", share), look_at_all(model, "test", share)
    n_rows = max(6, int(200 * share))
    held_out = batches(
        unseen_rows(encoder, unseen, (EVALUATION_SEED,), {"image": n_rows, "video": n_rows // 3}),
        encoder,
    )
    torch.manual_seed(recipe.seed)
    scaffold = Scaffold()
    adam = optimiser(model, scaffold, recipe)
    began = time.monotonic()
    with (run / log_name).open("w", encoding="utf-8") as log:
        log.write(json.dumps({"recipe": asdict(recipe)}) + "\n")
        for step in range(recipe.n_steps):
            batch = encode_rows(training_rows(recipe, step, encoder, seen), encoder)
            record = train_step(model, scaffold, adam, batch, seen, recipe, step)
            done = step + 1
            record |= {"lr": learning_rate(recipe, step), "seconds": time.monotonic() - began}
            if done % EVALUATE_EVERY == 0 or done == recipe.n_steps:
                found = answers(model, held_out, unseen).share()
                record |= {f"held_out/{kind}": right for kind, right in found.items()}
                torch.save(model.state_dict(), run / weights_name)
            if done % LOG_EVERY == 0 or done == recipe.n_steps:
                rounded = {name: round(value, 4) for name, value in record.items()}
                log.write(json.dumps({"step": done} | rounded) + "\n")
                log.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the built-in model tiny-vl.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--eye", type=Path, help="weights of stage 1; RUN/eye.pt if absent")
    parser.add_argument(
        "--last-stage",
        choices=("no", "too", "only"),
        default="no",
        help="stage 3, for the twin; `only` goes on from the run's final.pt",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0, help="of the scenes, for a quick try")
    numbers = [field.name for field in fields(Recipe) if field.type in ("int", "float")]
    for name in numbers:
        default = getattr(Recipe(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = replace(Recipe(), **{name: getattr(args, name) for name in numbers})
    args.run.mkdir(parents=True, exist_ok=True)
    if args.last_stage == "only":
        model = new_model(recipe, {})
        model.load_state_dict(torch.load(args.run / "final.pt", weights_only=True))
    else:
        eye_weights = open_eye(args.eye or args.run / "eye.pt", EyeRecipe())
        model = train(args.run, recipe, eye_weights, args.share)
    if args.last_stage != "no":
        optimise(model, last_stage(recipe), args.run, "last.jsonl", "last.pt", args.share)


if __name__ == "__main__":
    main()
