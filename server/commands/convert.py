"""`gpt2-server convert SOURCE DEST`: a GPT-2 of another format, rewritten in the one that is served.

A process of its own reads the source, since it may hold anything; DEST is there when all of it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from model.conversion.apart import convert
from model.errors import ConversionError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a file or a directory of any format that is read")
    parser.add_argument("destination", type=Path, metavar="DEST", help="a directory that is not there yet")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="its tokenizer [beside the source, or GPT-2's own]"
    )


def run(arguments: argparse.Namespace) -> int:
    source, destination = arguments.source.expanduser(), arguments.destination.expanduser()
    try:
        converted = convert(source, destination, arguments.tokenizer)
    except ConversionError as error:
        raise ConversionError(f"{source}: {error}") from None
    print(f"{source}, {converted.format}, in {destination}")
    print(f"serve it:  gpt2-server serve {destination}")
    return 0
