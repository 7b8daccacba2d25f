"""The process that opens a foreign file: SECONDS model SOURCE DIRECTORY [TOKENIZER], or SECONDS tensors FILE FILE.

It confines itself, writes into the directory it was given, and prints one line, an `apart.Answer`.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from model.conversion.apart import Answer, encode
from model.conversion.confinement import confine
from model.conversion.detection import files_of, open_source
from model.conversion.layout import Source, lazy, regular_size
from model.conversion.pickles import open_pickle, tensors_of
from model.conversion.vocabulary import settle_tokenizer
from model.conversion.writing import write_model, write_safetensors
from model.errors import ModelError

MEMORY = 1 << 30  # bytes beside twice the file: the largest tensor, as fp32
WRITTEN_PER_BYTE = 16  # a weight of 2 bits becomes one of 32


def main(arguments: list[str]) -> Answer:
    seconds, task, source, destination, *rest = arguments
    path = Path(source)
    try:
        size = sum(regular_size(file) for file in files_of(path))
        confine(memory=2 * size + MEMORY, seconds=int(seconds), written=WRITTEN_PER_BYTE * size + MEMORY)
        if task == "tensors":
            write_safetensors(
                Path(destination), {name: lazy(tensor) for name, tensor in tensors_of(open_pickle(path)).items()}
            )
            return Answer()
        found = rewrite(path, Path(destination), Path(rest[0]) if rest else None)
        return Answer(format=found.format, files=[file.name for file in found.files])
    except ModelError as error:
        return Answer(error=str(error))
    except MemoryError:
        return Answer(error=f"{path.name} asks for more memory than twice its size: it is damaged or hostile")
    except OSError as error:
        return Answer(
            error=f"cannot read {path.name} or write the result: {error.strerror or 'an error of the system'}"
        )
    except Exception:  # whatever a parser makes of bytes that nobody vouches for
        return Answer(error=f"{path.name} is damaged, or is not what it seems")


def rewrite(source: Path, directory: Path, tokenizer: Path | None = None) -> Source:
    """Raises ModelError."""
    found = open_source(source)
    settle_tokenizer(found, tokenizer)
    write_model(found, directory)
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(encode(main(sys.argv[1:])))  # noqa: T201
