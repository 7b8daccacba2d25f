"""`gpt2-server fine-tune TRAIN.jsonl --out DIR`: a model, or an adapter for it, that has learnt a file of examples."""

from __future__ import annotations

import argparse
from pathlib import Path

from model.training.job import Dpo, Lora
from server.commands.training import add_common, add_from_scratch, checkpoint_of, common_fields, train
from server.errors import SettingsError


def configure(parser: argparse.ArgumentParser) -> None:
    lora = Lora()
    parser.add_argument(
        "train", metavar="TRAIN.jsonl", help='lines of {"prompt", "completion"}, {"text"} or {"messages"}'
    )
    parser.add_argument(
        "--method",
        default="supervised",
        choices=["supervised", "dpo"],
        help="dpo: of two answers the preferred one, from lines of {prompt, chosen, rejected} [%(default)s]",
    )
    parser.add_argument("--beta", type=float, default=Dpo().beta, metavar="X", help="of dpo [%(default)g]")
    parser.add_argument("--model", metavar="MODEL", help="directory, Hugging Face id, or nothing: the default")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter of the model, to start from")
    parser.add_argument(
        "--trainable",
        default="lora",
        choices=["lora", "full", "output_layer"],
        help="an adapter beside frozen weights; all weights; or the output layer alone [%(default)s]",
    )
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja, for messages")
    parser.add_argument("--name", metavar="NAME", help="what the card calls it")
    group = parser.add_argument_group("LoRA")
    group.add_argument("--rank", type=int, default=lora.rank, metavar="N", help="[%(default)s]")
    group.add_argument("--alpha", type=float, default=lora.alpha, metavar="X", help="[%(default)g]")
    group.add_argument(
        "--targets",
        nargs="+",
        default=list(lora.targets),
        metavar="NAME",
        help=f"matrices it is put beside [{' '.join(lora.targets)}]",
    )
    group.add_argument("--merge", action="store_true", help="write a whole model in place of an adapter")
    add_from_scratch(parser)
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    directory, name = checkpoint_of(arguments.model)
    fields = common_fields(arguments)
    for key in ("method", "trainable", "adapter", "name"):
        fields[key] = getattr(arguments, key)
    fields |= {"model": directory, "base_name": name, "chat_template": _template(arguments.chat_template)}
    fields["dpo"] = {"beta": arguments.beta}
    fields["lora"] = {key: getattr(arguments, key) for key in ("rank", "alpha", "targets", "merge")}
    return train(fields)


def _template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        raise SettingsError("cannot read the chat template") from None
