"""The image, built from the Dockerfile by buildah and run without a Docker engine.

The base image is made by debootstrap: the same Debian release with its own Python 3.11, which is what can be had where
no registry of images can be reached; the steps on top are the Dockerfile's, run by a real builder in a chroot. What is
particular to a machine comes from its environment: DEBIAN_MIRROR, and BUILDAH_FLAGS for `buildah build` (mounts of
package indexes, --build-arg TORCH_INDEX=…).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BASE = "docker.io/library/python:3.11-slim-bookworm"
MIRROR = "http://deb.debian.org/debian"
PACKAGES = "python3,python3-venv,ca-certificates"
TOOLS = ("buildah", "debootstrap", "bwrap")


@dataclass(frozen=True, slots=True)
class Image:
    root: Path  # mounted
    config: dict[str, Any]  # as Docker has it: Env, User, Entrypoint, Cmd …
    size: int  # of all its files, in bytes

    def command(self, scratch: Path, *arguments: str) -> list[str]:
        """Its entry point as its user, without capabilities; of its files it can write /tmp and /models alone."""
        user, group = self.config["User"].split(":")
        models = scratch / "models"
        models.mkdir(exist_ok=True)
        os.chown(models, int(user), int(group))
        sandbox = ["bwrap", "--ro-bind", self.root, "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp"]
        sandbox += [
            "--bind",
            models,
            "/models",
            "--chdir",
            self.config["WorkingDir"],
            "--unshare-pid",
            "--die-with-parent",
        ]
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):  # setpriv gives them up
            sandbox += ["--cap-add", capability]
        sandbox.append("--clearenv")
        for variable in self.config["Env"]:
            sandbox += ["--setenv", *variable.split("=", 1)]
        become = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--bounding-set=-all"]
        become += ["--inh-caps=-all", "--no-new-privs", "--"]
        return [*map(str, sandbox), *become, *self.config["Entrypoint"], *arguments]


class Builder:
    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._buildah = ["buildah", "--root", f"{scratch}/store", "--runroot", f"{scratch}/run"]
        self._buildah += ["--storage-driver", "overlay"]

    def _run(self, *arguments: str) -> str:
        environment = {**os.environ, "BUILDAH_ISOLATION": "chroot", "BUILDAH_FORMAT": "docker"}
        command = [*self._buildah, *arguments]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, (command, result.stdout[-3000:], result.stderr[-3000:])
        return result.stdout.strip()

    def make_base(self) -> None:
        base = self._scratch / "base"
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", base]
        subprocess.run([*command, os.environ.get("DEBIAN_MIRROR", MIRROR)], check=True, capture_output=True)
        (base / "usr/bin/python").symlink_to("python3")  # as in the image it stands for
        container = self._run("from", "scratch")
        self._run("add", "--quiet", container, str(base), "/")
        self._run("commit", "--quiet", container, BASE)
        self._run("rm", container)
        shutil.rmtree(base)

    @contextmanager
    def built(self, target: str) -> Iterator[Image]:
        flags = shlex.split(os.environ.get("BUILDAH_FLAGS", ""))
        self._run("build", "--network=host", "--pull-never", "--target", target, "--tag", target, *flags, ".")
        container = self._run("from", "--pull-never", target)
        root = Path(self._run("mount", container))
        try:
            config = json.loads(self._run("inspect", "--type", "image", target))["Docker"]["config"]
            files = (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
            yield Image(root, config, sum(path.stat().st_size for path in files))
        finally:
            self._run("umount", container)

    def clean(self) -> None:
        self._run("rm", "--all")
        self._run("rmi", "--all", "--force")
