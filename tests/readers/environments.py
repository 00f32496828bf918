"""Environments with one reader each, made from the package index and kept beside ``.venv``.

An environment sees what this process's environment has installed and puts its own packages first. Nothing is added to
this process's environment, and no dependency is resolved: a reader's own requirements are gigabytes of CUDA libraries.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import REPOSITORY, python_path

VLLM, SGLANG, LLAMA_CPP = "vllm==0.33.0", "sglang==0.5.23", "llama-cpp-python==0.3.36"
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Environment:
    """A Python with a reader.

    Attributes:
        directory: the virtual environment.
    """

    directory: Path

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    @property
    def packages(self) -> Path:
        return next((self.directory / "lib").glob("python*/site-packages"))

    def run(self, script: str | Path, *arguments: str | Path) -> str:
        """Runs a script in the environment and returns what it wrote to stdout; a failure has the end of its stderr."""
        offline = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        path = {"PYTHONPATH": python_path(HERE)}
        ended = subprocess.run(
            [self.python, script, *arguments],
            env={**os.environ, **offline, **path},
            check=False,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr[-4000:]
        return ended.stdout


def _pip(*arguments: str | Path) -> None:
    """Runs pip. Skips the test if the package index cannot be reached, and fails for any other reason."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if ended.returncode:
        text = f"{ended.stdout}\n{ended.stderr}"
        unreachable = ("Could not find a version", "NewConnectionError", "Failed to establish", "ConnectTimeout")
        if any(words in text for words in unreachable):
            pytest.skip(f"the package index does not give {arguments[-1]}: {text.strip().splitlines()[-1]}")
        raise AssertionError(text[-4000:])


def _download(requirement: str, directory: Path, *options: str) -> Path:
    _pip("download", "--quiet", "--no-deps", "--dest", directory, *options, requirement)
    (file,) = (path for path in directory.iterdir() if path.suffix in (".whl", ".gz"))
    return file


def _environment(name: str, parts: tuple[str, ...], fill: Callable[[Environment, Path], None]) -> Environment:
    """Returns the environment ``.venv-reader-<name>``, which ``fill`` makes if ``parts`` are not what it holds."""
    environment = Environment(REPOSITORY / f".venv-reader-{name}")
    mark = environment.directory / "parts.json"
    if mark.is_file() and json.loads(mark.read_text()) == list(parts):
        return environment
    shutil.rmtree(environment.directory, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment.directory], check=True)
    # A path in a .pth file is not searched for further .pth files, so the editable install stays invisible.
    (environment.packages / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with tempfile.TemporaryDirectory(prefix="moe-fused-reader-") as temporary:
        fill(environment, Path(temporary))
    mark.write_text(json.dumps(parts))
    return environment


def _sources_of_wheel(requirement: str, others: tuple[str, ...]) -> Callable[[Environment, Path], None]:
    """A wheel without its compiled modules, which need a GPU's libraries, and what its Python code imports."""

    def fill(environment: Environment, temporary: Path) -> None:
        with zipfile.ZipFile(_download(requirement, temporary, "--only-binary", ":all:")) as wheel:
            kept = [name for name in wheel.namelist() if name.endswith(".py") or ".dist-info/" in name]
            wheel.extractall(environment.packages, kept)
        if others:
            _pip("install", "--quiet", "--no-deps", "--target", environment.packages, *others)

    return fill


def vllm() -> Environment:
    others = (
        *("aiohappyeyeballs", "aiohttp", "aiosignal", "attrs", "blake3", "cachetools", "cbor2", "cloudpickle", "depyf"),
        *("distro", "einops", "frozenlist", "ijson", "jiter", "jsonschema", "loguru", "msgspec", "multidict", "openai"),
        *("prometheus_client", "propcache", "protobuf", "py-cpuinfo", "pybase64", "pyzmq", "sentencepiece"),
        *("sniffio", "yarl"),
    )
    return _environment("vllm", (VLLM, *others), _sources_of_wheel(VLLM, others))


def sglang() -> Environment:
    return _environment("sglang", (SGLANG,), _sources_of_wheel(SGLANG, ()))


def llama_cpp() -> Environment:
    """llama.cpp's converters, which llama-cpp-python's source distribution carries. Nothing is compiled."""

    def fill(environment: Environment, temporary: Path) -> None:
        with tarfile.open(_download(LLAMA_CPP, temporary, "--no-binary", "llama-cpp-python")) as sources:
            sources.extractall(temporary, filter="data")
        (project,) = temporary.glob("llama_cpp_python-*/vendor/llama.cpp")
        converters = environment.directory / "converters"
        shutil.copytree(project / "conversion", converters / "conversion")
        shutil.copytree(project / "gguf-py", converters / "gguf-py")
        shutil.copy(project / "convert_lora_to_gguf.py", converters)

    return _environment("llama-cpp", (LLAMA_CPP,), fill)
