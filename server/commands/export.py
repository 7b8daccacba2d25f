"""`gpt2-server export MODEL DEST`: a model, with an adapter merged into it or not, as other programs read it."""

from __future__ import annotations

import argparse
from pathlib import Path

from model.config import Activation
from model.conversion.exporting import GGUF_KINDS, load, write_gguf, write_hugging_face, write_nanogpt
from model.errors import ModelError
from server.checkpoint import find_checkpoint

FORMATS = ("huggingface", "gguf", "nanogpt")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory, or a Hugging Face id")
    parser.add_argument("destination", type=Path, metavar="DEST", help="a directory or a file that is not there yet")
    parser.add_argument("--to", choices=FORMATS, default=FORMATS[0], help="[%(default)s, a directory that is served]")
    parser.add_argument("--dtype", choices=tuple(GGUF_KINDS), help="of a GGUF's matrices and embeddings [float32]")
    parser.add_argument("--merge", type=Path, metavar="ADAPTER", help="an adapter of the model, to be made part of it")
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit of a Hugging Face id")


def run(arguments: argparse.Namespace) -> int:
    if arguments.dtype is not None and arguments.to != "gguf":
        raise ModelError("--dtype goes with --to gguf: other formats keep the model's own numbers")
    destination = arguments.destination.expanduser()
    checkpoint = find_checkpoint(arguments.model, arguments.revision)
    model = load(checkpoint.directory, arguments.merge)
    match arguments.to:
        case "gguf":
            write_gguf(model, destination, arguments.dtype or "float32")
        case "nanogpt":
            write_nanogpt(model, destination)
            if model.config.activation is not Activation.GELU_ERF:
                print("nanoGPT computes GELU exactly, and this model approximates it: its numbers will differ a little")
        case _:
            write_hugging_face(model, destination)
            print(f"serve it:  gpt2-server serve {destination}")
    print(f"{checkpoint.name}, as {arguments.to}, in {destination}")
    return 0
