"""`gpt2-server distill TEXT.jsonl --out DIR`: a smaller model that has learnt what a larger one would say."""

from __future__ import annotations

import argparse

from model.training.job import Distillation
from server.commands.training import add_common, add_from_scratch, checkpoint_of, common_fields, train

TERMS = ("temperature", "soft", "hard", "hidden", "attention")


def configure(parser: argparse.ArgumentParser) -> None:
    defaults = Distillation(teacher="")
    parser.add_argument("train", metavar="TEXT.jsonl", help='lines of {"text"} or {"prompt", "completion"}')
    parser.add_argument("--teacher", metavar="MODEL", help="directory, Hugging Face id, or nothing: the default")
    student = parser.add_argument_group("student")
    student.add_argument("--layers", type=int, metavar="N", help="copied from the teacher's; default: half of them")
    student.add_argument("--student", metavar="DIR", help="start from this model instead")
    student.add_argument("--freeze-embeddings", action="store_true", help="they stay the teacher's")
    terms = parser.add_argument_group("loss (weights relative to each other)")
    terms.add_argument("--temperature", type=float, default=defaults.temperature, metavar="X", help="[%(default)g]")
    terms.add_argument(
        "--soft", type=float, default=defaults.soft, metavar="X", help="the teacher's probabilities [%(default)g]"
    )
    terms.add_argument("--hard", type=float, default=defaults.hard, metavar="X", help="the text itself [%(default)g]")
    terms.add_argument(
        "--hidden",
        type=float,
        default=defaults.hidden,
        metavar="X",
        help="the teacher's last hidden states [%(default)g]",
    )
    terms.add_argument(
        "--attention", type=float, default=defaults.attention, metavar="X", help="where the teacher looks [%(default)g]"
    )
    add_from_scratch(parser)
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    directory, name = checkpoint_of(arguments.teacher)
    distillation = {term: getattr(arguments, term) for term in TERMS}
    distillation |= {"teacher": directory, "layers": arguments.layers}
    distillation["embeddings"] = "freeze" if arguments.freeze_embeddings else "train"
    fields = common_fields(arguments)
    fields |= {"method": "distillation", "trainable": "full", "distillation": distillation, "base_name": name}
    fields["model"] = None if arguments.student is None else checkpoint_of(arguments.student)[0]
    return train(fields)
