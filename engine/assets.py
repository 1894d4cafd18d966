"""Where a job's models are on disk, and the made-from-seed models of the presets `tiny` and `bench`.

`python -m engine.assets --config FILE` makes whatever the configuration needs and prints the paths. Any number of
processes may ask at once: one makes, under a file lock, in a directory that gets its name only when it is complete.
What exists already is found without importing torch, transformers or diffusers.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.config import EngineConfig, load
from engine.errors import CodecError, EngineError, WeightsError

MADE_PRESETS = ("tiny", "bench")
FORMAT = 1  # raise it whenever what is made for a seed changes
LOCK_TIMEOUT_S = 180.0
_POLL_S = 0.02

GENERATOR_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class AssetPaths:
    checkpoint: Path
    text_encoder: Path
    vae: Path


def all_paths(config: EngineConfig) -> AssetPaths:
    """Every model of this configuration, made where it must be. Raises as the three functions below."""
    return AssetPaths(generator_checkpoint(config), text_encoder_dir(config), vae_dir(config))


def generator_checkpoint(config: EngineConfig) -> Path:
    """The generator's checkpoint: `model.checkpoint`, or the file made for the preset and seed.

    Raises:
        WeightsError: not configured for a preset that is not made from a seed, or not there.
    """
    if config.model.checkpoint:
        return _given(config.model.checkpoint, "model.checkpoint", WeightsError, "TP-4002")
    if config.model.preset not in MADE_PRESETS:
        raise WeightsError(
            f"preset {config.model.preset} needs model.checkpoint: the path of a .safetensors or .pt file, or of a "
            f"directory with {GENERATOR_FILE} or its index",
            code="TP-4001",
        )

    def make(directory: Path) -> None:
        from engine.seeded import make_generator

        make_generator(directory / GENERATOR_FILE, config.dims, config.model.weights_seed)

    return _made(config, "generator", make) / GENERATOR_FILE


def text_encoder_dir(config: EngineConfig) -> Path:
    """The directory of the text encoder and tokenizer: `model.text_encoder`, or the one made. Raises CodecError."""
    if config.model.text_encoder:
        return _given(config.model.text_encoder, "model.text_encoder", CodecError, "TP-5002")
    _require_made(config, "model.text_encoder", "the directory of UMT5's config.json, model.safetensors and tokenizer")

    def make(directory: Path) -> None:
        from engine.seeded import make_text_encoder

        make_text_encoder(directory, config.dims, config.model.weights_seed)

    return _made(config, "text_encoder", make)


def vae_dir(config: EngineConfig) -> Path:
    """The directory of the VAE: `model.vae`, or the one made. Raises CodecError."""
    if config.model.vae:
        return _given(config.model.vae, "model.vae", CodecError, "TP-5010")
    _require_made(config, "model.vae", "the directory of the VAE's config.json and diffusion_pytorch_model.safetensors")

    def make(directory: Path) -> None:
        from engine.seeded import make_vae

        make_vae(directory, config.model.weights_seed)

    return _made(config, "vae", make)


def cache_dir(config: EngineConfig) -> Path:
    """`model.cache_dir`, or the user's cache directory."""
    if config.model.cache_dir:
        return Path(config.model.cache_dir).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("tpctl"))


def _given(value: str, key: str, kind: type[EngineError], code: str) -> Path:
    path = Path(value).expanduser()
    if not path.exists():
        raise kind(f"{key} is {value}, and there is nothing", code=code, where=key, next_step="tpctl config check")
    return path


def _require_made(config: EngineConfig, key: str, what: str) -> None:
    if config.model.preset not in MADE_PRESETS:
        raise CodecError(
            f"preset {config.model.preset} needs {key}: {what}", code="TP-5001", next_step="tpctl config check"
        )


def _made(config: EngineConfig, part: str, make: Callable[[Path], None]) -> Path:
    """The directory of one made part; made now if it is not there."""
    root = cache_dir(config)
    # The sizes are in the key too, so that a preset that changes never meets the files of its past.
    sizes = hashlib.blake2b(repr(config.dims).encode(), digest_size=4).hexdigest()
    name = f"{config.model.preset}-{sizes}-seed{config.model.weights_seed}-v{FORMAT}-{part}"
    final = root / name
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{name}.lock"):
            if final.is_dir():  # another process made it while this one waited
                return final
            for leftover in root.glob(f".{name}.*.part"):  # of a maker that was killed; its lock went with it
                shutil.rmtree(leftover, ignore_errors=True)
            building = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=root))
            try:
                make(building)
                building.chmod(0o755)
                building.rename(final)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise WeightsError(
            f"cannot write the {config.model.preset} preset's models to {root}: {error.strerror or error}",
            code="TP-4010",
            where=str(root),
            next_step="set model.cache_dir to a directory that can be written",
        ) from error
    return final


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """An exclusive lock that ends with the process that holds it, however it ends."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise WeightsError(
                        f"another process has held {file} for {LOCK_TIMEOUT_S:.0f} s while it makes models",
                        code="TP-4011",
                        where=str(file),
                    ) from None
                time.sleep(_POLL_S)  # flock has no deadline of its own
        yield
    finally:
        os.close(descriptor)


def main(arguments: list[str] | None = None) -> int:
    """Make and print; exit code as the error's."""
    parser = argparse.ArgumentParser(prog="python -m engine.assets", description="Make the models of a configuration.")
    parser.add_argument("--config", type=Path, required=True, help="configuration file (TOML)")
    options = parser.parse_args(arguments)
    try:
        paths = all_paths(load([("flag", options.config)]).config)
    except EngineError as error:
        parser.exit(error.exit_code, f"{error.code}: {error.message}\n  next: {error.next_step}\n")
    print(f"checkpoint {paths.checkpoint}\ntext_encoder {paths.text_encoder}\nvae {paths.vae}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
