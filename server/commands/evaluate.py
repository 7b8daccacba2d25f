"""`gpt2-server evaluate MODEL FILE`: how well a model says a held-out text, by the numbers that a server answers with.

The file is lines as for training, of which the tokens are scored that would be learnt, or any other text, all of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from model.adapter_config import is_adapter
from model.config import read_config
from model.tokenizer import Tokenizer, read_tokenizer
from model.training.dataset import Example, Reader, TooLong, read_examples, text_windows
from server import logs
from server.assembly import Backend
from server.checkpoint import find_checkpoint
from server.commands.local import ask, serving_here
from server.errors import SettingsError
from server.settings import Settings, read_settings, some_flags

AT_ONCE = 16  # examples in a request
TEXT_BYTES_MAX = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    model: str
    tokens: int  # scored
    loss: float  # nats a token
    perplexity: float
    accuracy: float  # share of tokens that were the most likely ones
    bits_per_byte: float  # of the scored tokens' text: what models of other vocabularies can be compared by


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory, or a Hugging Face id")
    parser.add_argument("file", metavar="FILE", type=Path, help=".jsonl as for training, or text")
    parser.add_argument(
        "--beside",
        metavar="DIR",
        nargs="+",
        default=[],
        help="LoRA adapters of the model, and other models, which get a row each",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON array in place of a table")
    some_flags(parser, "revision", "device", "dtype", "quantization", "kernels", "threads")


def run(arguments: argparse.Namespace) -> int:
    logs.configure("warning")
    settings = read_settings(arguments)
    scores = [asyncio.run(_evaluate(settings, each, arguments.file)) for each in (None, *arguments.beside)]
    if arguments.json:
        print(json.dumps([asdict(score) for score in scores], indent=2))
    else:
        print("\n".join(table(scores)))
    return 0


def table(scores: Sequence[Score]) -> list[str]:
    width = max(len("model"), *(len(score.model) for score in scores))
    lines = [f"{'model':<{width}}  {'tokens':>9}  {'loss':>8}  {'perplexity':>10}  {'accuracy':>8}  {'bits/byte':>9}"]
    lines += [
        f"{each.model:<{width}}  {each.tokens:>9,}  {each.loss:>8.4f}  {each.perplexity:>10.2f}  "
        f"{each.accuracy:>8.2%}  {each.bits_per_byte:>9.4f}"
        for each in scores
    ]
    return lines


async def _evaluate(settings: Settings, beside: str | None, file: Path) -> Score:
    """Raises ModelError or SettingsError."""
    name = settings.model if beside is None else beside
    adapter = beside is not None and is_adapter(Path(beside).expanduser())
    model = settings.model if beside is None or adapter else beside
    directory = find_checkpoint(model, settings.revision if model == settings.model else None).directory
    config = read_config(directory)
    tokenizer = read_tokenizer(directory, config.vocab_size, config.eos_token_ids)
    # The last token of an example is read here as well, for its probability is asked for as a prompt's.
    examples = _examples(file, tokenizer, config.n_positions - 1)
    own = {"model": str(directory), "served_model_name": [], "lora_modules": [f"it={beside}"] if adapter else []}
    async with serving_here(settings.model_copy(update={**own, "max_num_seqs": AT_ONCE})) as backend:
        counted = _Counted()
        for first in range(0, len(examples), AT_ONCE):
            await _score(backend, "it" if adapter else "", examples[first : first + AT_ONCE], tokenizer, counted)
            if sys.stderr.isatty():
                done = min(first + AT_ONCE, len(examples)) / len(examples)
                print(f"\r{name}: {done:.0%}", end="\r\033[K" if done == 1 else "", file=sys.stderr, flush=True)
    return counted.score(str(name))


def _examples(file: Path, tokenizer: Tokenizer, context: int) -> list[Example]:
    """Raises DataError or SettingsError."""
    if file.suffix == ".jsonl":
        return read_examples(file, Reader(tokenizer, context, too_long=TooLong.SPLIT))
    try:
        if file.stat().st_size > TEXT_BYTES_MAX:
            raise SettingsError(f"{file.name} is larger than {TEXT_BYTES_MAX} bytes")
        text = file.read_text("utf-8")
    except OSError as error:
        raise SettingsError(f"cannot read {file.name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{file.name} is not UTF-8") from None
    if not text:
        raise SettingsError(f"{file.name} is empty")
    return text_windows(text, tokenizer, context)


@dataclass(slots=True)
class _Counted:
    tokens: int = 0
    right: int = 0
    bytes: int = 0
    nats: float = 0.0

    def score(self, model: str) -> Score:
        loss = self.nats / self.tokens
        return Score(
            model=model,
            tokens=self.tokens,
            loss=loss,
            perplexity=math.exp(min(loss, 700.0)),
            accuracy=self.right / self.tokens,
            bits_per_byte=self.nats / math.log(2) / max(self.bytes, 1),
        )


async def _score(
    backend: Backend, model: str, examples: Sequence[Example], tokenizer: Tokenizer, counted: _Counted
) -> None:
    asked = {"model": model, "echo": True, "max_tokens": 0, "logprobs": 1}
    prompts = [example.tokens.tolist() for example in examples]
    answer = await ask(backend.app, {**asked, "prompt": prompts})
    for example, choice in zip(examples, answer["choices"], strict=True):
        found = choice["logprobs"]
        for place in _scored(example):
            own = found["token_logprobs"][place]
            counted.nats -= own
            counted.right += own >= max(found["top_logprobs"][place].values())
            counted.tokens += 1
            token = int(example.tokens[place])
            if token not in tokenizer.special_ids:
                counted.bytes += len(tokenizer.token_bytes(token))


def _scored(example: Example) -> Iterator[int]:
    yield from (place for place, learnt in enumerate(example.learnt) if learnt)
