"""What to do about a model on the Hugging Face Hub that has no safetensors where they were looked for."""

from __future__ import annotations

import re
from fnmatch import fnmatch

import huggingface_hub as hub  # what is in it is imported where it is asked for

PULL_REQUESTS = 20  # of a repository, that are looked into
CONVERTIBLE = (  # of the files in a repository, the first kind that is there
    ("pytorch_model.bin.index.json", "pytorch_model-*.bin"),
    ("pytorch_model.bin",),
    ("flax_model.msgpack",),
    ("tf_model.h5",),
)


def convertible(names: set[str]) -> set[str]:
    """Those of a repository's files that hold weights in one format that can be converted; none where there is none."""
    for patterns in CONVERTIBLE:
        found = {name for name in names for pattern in patterns if fnmatch(name, pattern)}
        if patterns[0] in found:
            return found
    return set()


def advice(repo: str, names: set[str]) -> str:
    """names: of the files that it has. One line that says what to type."""
    if not convertible(names):
        return f"{repo} has no safetensors weights, and none that can be converted"
    pickled = any(name.endswith(".bin") for name in convertible(names))
    line = f"{repo} has " + ("pickled weights alone, which can execute code" if pickled else "no safetensors weights")
    revision = _pull_request_with_safetensors(repo)
    if revision is not None:
        line += f"; a pull request has safetensors (--revision {revision})"
    return f"{line}; gpt2-server fetch {repo} --convert makes safetensors of them"


def names_on_hub(repo: str, revision: str | None) -> set[str]:
    """Of the files at its root. Empty where the Hub cannot be asked."""
    try:
        return {name for name in hub.HfApi().list_repo_files(repo, revision=revision) if "/" not in name}
    except (hub.errors.HfHubHTTPError, OSError, ValueError):
        return set()


def _pull_request_with_safetensors(repo: str) -> str | None:
    """refs/pr/N, the latest. None also where the Hub cannot be asked."""
    try:
        refs = hub.HfApi().list_repo_refs(repo, include_pull_requests=True).pull_requests or []
    except (hub.errors.HfHubHTTPError, OSError, ValueError, KeyError):
        return None
    numbers = sorted((int(ref.ref[8:]) for ref in refs if re.fullmatch(r"refs/pr/\d{1,9}", ref.ref)), reverse=True)
    for ref in (f"refs/pr/{number}" for number in numbers[:PULL_REQUESTS]):
        if any(name.endswith(".safetensors") for name in names_on_hub(repo, ref)):
            return ref
    return None
