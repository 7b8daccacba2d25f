"""`gpt2-server fetch ID`: brings a model here from the Hugging Face Hub, ahead of serving it.

Only safetensors and the small files beside them are taken, of one commit, each held against the digest the Hub states;
what was interrupted goes on where it was. SHA256SUMS beside them records revision and digests. With --convert, weights
of another format are taken where there are no safetensors, and rewritten as those.
"""

from __future__ import annotations

import argparse
import hashlib
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented all the same

from model.config import read_config
from model.conversion.apart import convert
from model.errors import ModelError
from model.tokenizer import read_tokenizer
from server.checkpoint import FILES
from server.hub import advice, convertible

SUMS = "SHA256SUMS"
READ_BYTES = 1 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="ID", help="as on the Hugging Face Hub: gpt2-medium, owner/name")
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit [the default branch's last]")
    parser.add_argument("--to", type=Path, metavar="DIR", help="a directory of its own [the Hub's cache]")
    parser.add_argument(
        "--convert", action="store_true", help="weights of another format too, rewritten in --to [a directory ID]"
    )


def run(arguments: argparse.Namespace) -> int:
    made: Path | None = arguments.to
    try:
        if arguments.convert:
            made, revision = _convert(arguments.model, arguments.revision, arguments.to)
            directory = made
        else:
            directory, revision = _fetch(arguments.model, arguments.revision, arguments.to)
    except HFValidationError:
        raise ModelError(f"{arguments.model!r} is no Hugging Face id") from None
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"the Hugging Face Hub did not give {arguments.model!r} ({type(error).__name__}); "
            "what has arrived is kept: run the command again"
        ) from None
    print(f"{arguments.model} at {revision}, in {directory}")
    print(f"serve it:  gpt2-server serve {made or f'{arguments.model} --revision {revision}'}")
    return 0


def _fetch(repo: str, revision: str | None, to: Path | None) -> tuple[Path, str]:
    """The directory and the commit. Raises ModelError, or what the Hub's client raises."""
    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    assert info.sha is not None
    files = _choose(repo, [each for each in info.siblings or [] if "/" not in each.rfilename])
    lines = [f"# {repo} {info.sha}"]
    directory = Path()
    for file in files:
        if file.lfs is not None:
            _large(repo, file, info.sha, to)
        path = Path(hf_hub_download(repo, file.rfilename, revision=info.sha, local_dir=to))
        directory = path.parent
        lines.append(f"{_checked(path, file)}  {file.rfilename}")
        if file.rfilename == "config.json":
            config = read_config(directory)  # what cannot be served is said before its weights are fetched
    read_tokenizer(directory, config.vocab_size, config.eos_token_ids)
    (directory / SUMS).write_text("\n".join([*lines, ""]), "utf-8")
    return directory, info.sha


def _convert(repo: str, revision: str | None, to: Path | None) -> tuple[Path, str]:
    """As `_fetch`, of weights in another format: they stay in the Hub's cache, and what is served is made of them."""
    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    assert info.sha is not None
    files = [each for each in info.siblings or [] if "/" not in each.rfilename]
    weights = convertible({file.rfilename for file in files})
    if any(file.rfilename.endswith(".safetensors") for file in files) or not weights:
        raise ModelError(f"{repo} has safetensors, or nothing that can be converted: fetch it without --convert")
    wanted = [file for file in files if file.rfilename in weights or _is_served(file)]
    directory = Path()
    for file in sorted(wanted, key=_order):
        if file.lfs is not None:
            _large(repo, file, info.sha, None)
        path = Path(hf_hub_download(repo, file.rfilename, revision=info.sha))
        directory = path.parent
        _checked(path, file)
        if file.rfilename == "config.json":
            read_config(directory)
    made = to or Path(repo.rpartition("/")[2])
    convert(directory, made)
    return made, info.sha


def _is_served(file: RepoSibling) -> bool:
    return any(fnmatch(file.rfilename, pattern) for pattern in FILES)


def _order(file: RepoSibling) -> tuple[bool, int]:
    """Smallest first but for config.json."""
    return file.rfilename != "config.json", file.size or 0


def _large(repo: str, file: RepoSibling, revision: str, to: Path | None) -> None:
    """Puts a large file where the Hub's client looks for it, which by itself would start from nothing every time."""
    assert file.lfs is not None
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
    path = cache / file.lfs.sha256 if to is None else to / file.rfilename
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("ab") as stream:
        url = hf_hub_url(repo, file.rfilename, revision=revision)
        http_get(url, stream, resume_size=stream.tell(), headers=build_hf_headers(), expected_size=file.size)
    _checked(part, file)
    part.rename(path)


def _choose(repo: str, files: list[RepoSibling]) -> list[RepoSibling]:
    """Those that are served. Raises ModelError."""
    wanted = [file for file in files if _is_served(file)]
    names = {file.rfilename for file in wanted}
    if "config.json" not in names:
        raise ModelError("the repository has no config.json")
    if not any(name.endswith(".safetensors") for name in names):
        raise ModelError(advice(repo, {file.rfilename for file in files}))
    if "model.safetensors" in names:  # the one that is served, whatever stands beside it
        wanted = [file for file in wanted if ".safetensors" not in file.rfilename or "model." in file.rfilename]
    return sorted(wanted, key=_order)


def _checked(path: Path, file: RepoSibling) -> str:
    """Its sha256. Raises ModelError where the file is not the one that the Hub describes."""
    sha256 = hashlib.sha256()
    blob = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)  # how git names it
    with path.open("rb") as stream:
        while data := stream.read(READ_BYTES):
            sha256.update(data)
            blob.update(data)
    stated, found = (file.lfs.sha256, sha256.hexdigest()) if file.lfs else (file.blob_id, blob.hexdigest())
    if stated != found:
        path.resolve().unlink()
        path.unlink(missing_ok=True)  # where it was a link
        raise ModelError(f"{file.rfilename} is not what the Hub states: its digest differs. It was removed; try again")
    return sha256.hexdigest()
