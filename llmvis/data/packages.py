"""Public packages by name: fetch a pinned Debian or npm package, check its hash, unpack it.

A package that already lies in the work folder is used as it is, so a machine without a
network can be given the files. This module knows nothing of what is inside a package.
"""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmvis.schema import UserError


@dataclass(frozen=True, kw_only=True)
class Package:
    """One pinned archive. `filename` is what the registry's own client writes."""

    name: str
    version: str
    filename: str
    sha256: str
    registry: Literal["debian", "npm"]


NOTO = Package(
    name="fonts-noto-color-emoji",
    version="2.042-0+deb12u1",
    filename="fonts-noto-color-emoji_2.042-0+deb12u1_all.deb",
    sha256="a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
    registry="debian",
)
EMOJIBASE = Package(
    name="emojibase-data",
    version="17.0.0",
    filename="emojibase-data-17.0.0.tgz",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    registry="npm",
)
OPENCLIPART_PNG = Package(
    name="openclipart-png",
    version="1:0.18+dfsg-19",
    filename="openclipart-png_1%3a0.18+dfsg-19_all.deb",
    sha256="f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    registry="debian",
)
OPENCLIPART_SVG = Package(
    name="openclipart-svg",
    version="1:0.18+dfsg-19",
    filename="openclipart-svg_1%3a0.18+dfsg-19_all.deb",
    sha256="989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    registry="debian",
)
TWEMOJI = Package(
    name="emoji-datasource-twitter",
    version="16.0.0",
    filename="emoji-datasource-twitter-16.0.0.tgz",
    sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    registry="npm",
)
FLUENT_FLAT = Package(
    name="@iconify-json/fluent-emoji-flat",
    version="1.2.6",
    filename="iconify-json-fluent-emoji-flat-1.2.6.tgz",
    sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    registry="npm",
)


def fetch(package: Package, folder: Path) -> Path:
    """Return the archive's path under `folder`, downloading it if it is not there.

    Raises `ValueError` where the client is missing, the download fails or the hash differs.
    """
    found = next(iter(sorted(folder.rglob(package.filename))), None)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        if package.registry == "debian":
            command = ["apt-get", "download", f"{package.name}={package.version}"]
        else:
            command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise UserError(f"no {command[0]} here: put {package.filename} into {folder}") from error
        except subprocess.CalledProcessError as error:
            why = error.stderr.strip()[-300:]
            raise UserError(f"{' '.join(command)}: {why}; put {package.filename} into {folder}") from error
        found = folder / package.filename
    digest = hashlib.sha256(found.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise UserError(f"{found} has sha256 {digest}, expected {package.sha256}: delete it and run again")
    return found


def unpack(package: Package, folder: Path) -> Path:
    """Fetch and unpack once; return the folder with the package's tree (`usr/…` or `package/…`)."""
    tree = folder / "unpacked" / f"{package.name.replace('/', '-')}-{package.sha256[:8]}"
    if tree.is_dir():
        return tree
    archive = fetch(package, folder)
    partial = tree.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)
    if package.registry == "debian":
        try:
            subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], check=True)
        except FileNotFoundError as error:
            raise UserError("dpkg-deb is not installed: unpack the package on a Debian machine") from error
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
    partial.rename(tree)  # a half-unpacked tree is never taken for a whole one
    return tree
