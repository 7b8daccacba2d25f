"""Trains a GPT-2 on a directory of text, from nothing or on from weights it has."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from model.config import Activation, ModelConfig, read_config
from model.tokenizer import read_tokenizer
from model.training.data import tokenise
from model.training.log import Log
from model.training.schedule import Progress
from model.training.trainer import STATE, Recipe, Trainer, run

VOCABULARY = 50257
SHAPE = ("layers", "width", "heads", "context")
STEP_SECONDS_CAP = 20.0  # a step longer than this was stopped, not slow

EPILOG = """\
The corpus is every *.txt and *.txt.xz of the directory, UTF-8, with <|endoftext|> between documents; the file whose
name begins with "valid" is measured on and never trained on. OUT receives the model (config.json, model.safetensors,
vocab.json, merges.txt: a Hugging Face GPT-2), log.csv, and state.safetensors, from which the same command resumes
after any kind of death. The length of a run is given as --minutes, which follows the machine's speed, or as --steps,
which ends with the same weights however often it is interrupted.

With --from, training goes on from a finished model: its shape and weights are taken, its optimiser starts anew, the
learning rates warm up and decay once more, and --seen says from where in the text to go on.
"""


def parser() -> argparse.ArgumentParser:
    recipe = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m model.training",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR", help="text to train on")
    parser.add_argument("--vocab", type=Path, required=True, metavar="DIR", help="GPT-2's vocab.json and merges.txt")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model, its log and its state")
    shape = parser.add_argument_group("shape")
    shape.add_argument("--layers", type=int, default=6, metavar="N", help="blocks (%(default)s)")
    shape.add_argument("--width", type=int, default=128, metavar="N", help="of the residual stream (%(default)s)")
    shape.add_argument("--heads", type=int, default=4, metavar="N", help="of attention, in each block (%(default)s)")
    shape.add_argument("--context", type=int, default=1024, metavar="N", help="positions (%(default)s)")
    shape.add_argument("--from", dest="begin", type=Path, metavar="MODEL", help="go on from this model, in its shape")
    shape.add_argument("--seen", type=int, default=0, metavar="N", help="tokens that it has been trained on")
    length = parser.add_argument_group("length").add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, metavar="N", help="train for this long, pauses not counted")
    length.add_argument("--steps", type=int, metavar="N", help="train for this many batches")
    how = parser.add_argument_group("recipe")
    how.add_argument("--batch-tokens", type=int, default=recipe.batch_tokens, metavar="N", help="(%(default)s)")
    how.add_argument("--candidates", type=int, default=recipe.candidates, metavar="N",
                     help="tokens of the vocabulary that the sampled softmax looks at (%(default)s)")  # fmt: skip
    how.add_argument("--muon-rate", type=float, default=recipe.muon_rate, metavar="X", help="of matrices (%(default)s)")
    how.add_argument("--adam-rate", type=float, default=recipe.adam_rate, metavar="X", help="of the rest (%(default)s)")
    how.add_argument("--seed", type=int, default=recipe.seed, metavar="N", help="(%(default)s)")
    how.add_argument("--fp32", action="store_true", help="no bfloat16 in matrix products")
    how.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="of this machine (%(default)s)")
    how.add_argument("--save-every", type=float, default=120.0, metavar="SECONDS", help="(%(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser()
    args = options.parse_args(arguments)
    if args.begin and any(getattr(args, name) != options.get_default(name) for name in SHAPE):
        options.error("--from takes the model's own shape")
    if args.seen and not args.begin:
        options.error("--seen is of a model to go on --from")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(args.vocab / name, args.out / name)
    tokenizer = read_tokenizer(args.vocab, VOCABULARY, (VOCABULARY - 1,))
    train, valid = (tokenise(files, tokenizer, args.out / "tokens") for files in corpus_files(args.corpus))
    timed = args.minutes is not None
    progress = Progress(args.minutes * 60, cap=STEP_SECONDS_CAP) if timed else Progress(args.steps, cap=1.0)
    config = read_config(args.begin) if args.begin else model_config(args)
    trainer = Trainer(config, recipe(args), train, valid, progress)
    if (args.out / STATE).exists():
        trainer.resume(args.out)
    elif args.begin:
        trainer.begin_from(args.begin, args.seen)
    print(
        f"{trainer.network.config.parameters:,} parameters, {len(train):,} tokens, from step {trainer.step}", flush=True
    )
    with Log(args.out / "log.csv", trainer.step, trainer.tokens) as log:
        run(trainer, args.out, log, timed=timed, save_every=args.save_every)


def corpus_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """The files to train on and those to measure on, each in order of name."""
    files = sorted([*directory.glob("*.txt"), *directory.glob("*.txt.xz")])
    valid = [file for file in files if file.name.startswith("valid")]
    train = [file for file in files if file not in valid]
    if not train or not valid:
        raise SystemExit("the corpus needs text to train on and a file valid.txt or valid.txt.xz")
    return train, valid


def model_config(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        n_layer=args.layers,
        n_head=args.heads,
        n_embd=args.width,
        n_positions=args.context,
        vocab_size=VOCABULARY,
        n_inner=4 * args.width,
        activation=Activation.GELU_TANH,
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=True,
        eos_token_ids=(VOCABULARY - 1,),
    )


def recipe(args: argparse.Namespace) -> Recipe:
    return Recipe(
        batch_tokens=args.batch_tokens,
        candidates=args.candidates,
        muon_rate=args.muon_rate,
        adam_rate=args.adam_rate,
        seed=args.seed,
        half_precision=not args.fp32,
    )


if __name__ == "__main__":
    main()
