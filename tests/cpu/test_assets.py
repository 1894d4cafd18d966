"""Models made from a seed: the same everywhere, made once, found fast, and lively enough to test with."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.assets import all_paths, generator_checkpoint, main, text_encoder_dir, vae_dir
from engine.codecs.text import TextEncoder
from engine.config import EngineConfig, from_dict
from engine.errors import CodecError, WeightsError
from engine.model.checkpoint_names import translate
from engine.model.sharding import param_shapes
from engine.model.weights import load_shard


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    config = EngineConfig().replace(model__cache_dir=str(tmp_path_factory.mktemp("cache")))
    all_paths(config)
    return config


def write_config(directory: Path, cache: Path, extra: str = "") -> Path:
    file = directory / "tpctl.toml"
    file.write_text(f'[model]\ncache_dir = "{cache}"\n{extra}')
    return file


def digest(root: Path) -> dict[str, str]:
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }


def test_two_machines_make_the_same_bytes(config: EngineConfig, tmp_path: Path):
    # Another process, other hash seeds, another number of threads.
    file = write_config(tmp_path, tmp_path / "cache")
    subprocess.run(
        [sys.executable, "-m", "engine.assets", "--config", str(file)],
        env=os.environ | {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        timeout=120,
        check=True,
    )
    mine = digest(Path(config.model.cache_dir))
    assert digest(tmp_path / "cache") == mine
    assert sum(name.endswith("safetensors") for name in mine) == 3


def test_another_seed_makes_other_weights(config: EngineConfig):
    other = generator_checkpoint(config.replace(model__weights_seed=1))
    first = generator_checkpoint(config)
    assert other != first
    one, two = load_file(first), load_file(other)
    assert not any(torch.equal(one[name], two[name]) for name in one)


def test_the_checkpoint_is_a_checkpoint(config: EngineConfig):
    state, report = load_shard(generator_checkpoint(config), config.dims, 0, 1, device="cpu", dtype=torch.float32)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == param_shapes(config.dims)
    assert report.layout == "safetensors/wan"
    # No tensor is constant and none repeats another: a tensor in the wrong place changes the result.
    assert all(float(tensor.std()) > 0 for tensor in state.values())
    assert len({tensor.numpy().tobytes() for tensor in state.values()}) == len(state)


def test_the_generator_is_stable_and_hears_the_prompt(config: EngineConfig):
    from diffusers import WanTransformer3DModel

    dims = config.dims
    model = WanTransformer3DModel(
        num_attention_heads=dims.num_heads,
        attention_head_dim=dims.head_dim,
        text_dim=dims.text_dim,
        freq_dim=dims.freq_dim,
        ffn_dim=dims.ffn_dim,
        num_layers=dims.num_layers,
    ).eval()
    names = translate(model.state_dict())[1]
    model.load_state_dict({names[name]: t for name, t in load_file(generator_checkpoint(config)).items()})
    text = TextEncoder.load(text_encoder_dir(config), dims.text_len, device="cpu", dtype=torch.float32)
    noise = torch.randn(2, 1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(5))

    @torch.no_grad()
    def flow(prompt: str, index: int = 0, timestep: int = 1000) -> torch.Tensor:
        embeds = text.encode(prompt).embeds_1LD
        return model(noise[index], torch.tensor([timestep]), embeds, return_dict=False)[0]

    base = flow("a small boat on a calm lake")
    assert 0.3 < float(base.std()) < 3
    for other in (
        flow("a red fox in the snow"),
        flow("a small boat on a calm lake", index=1),
        flow("a small boat on a calm lake", timestep=250),
    ):
        assert float((other - base).std()) > 0.2 * float(base.std())


def test_a_second_call_is_light(config: EngineConfig, tmp_path: Path):
    file = write_config(tmp_path, Path(config.model.cache_dir))
    code = (
        "import sys; from engine.assets import main; main(['--config', sys.argv[1]])\n"
        "heavy = {'torch', 'numpy', 'transformers', 'diffusers', 'tokenizers', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=60, check=True
    )
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert set(lines) == {"checkpoint", "text_encoder", "vae"}
    assert all(Path(path).exists() for path in lines.values())


def test_a_generator_is_made_without_the_stage_0_libraries(tmp_path: Path):
    code = (
        "import sys; from engine.assets import generator_checkpoint; from engine.config import EngineConfig\n"
        "assert generator_checkpoint(EngineConfig().replace(model__cache_dir=sys.argv[1])).is_file()\n"
        "heavy = {'transformers', 'diffusers', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=True)
    assert len(list(tmp_path.glob("*-generator"))) == 1


def test_many_processes_at_once_make_one_model(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; import torch; import engine.assets as a, engine.seeded as s\n"
        "from engine.config import EngineConfig\n"
        "make = s.make_generator\n"
        "def counted(*args):\n"
        "    open(sys.argv[1] + '/made', 'a').write('x')\n"
        "    make(*args)\n"
        "s.make_generator = counted\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(a.generator_checkpoint(EngineConfig().replace(model__cache_dir=sys.argv[1] + '/cache')))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        outputs = []
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        outputs = {process.communicate(timeout=60)[0].strip() for process in processes}
        assert [process.returncode for process in processes] == [0] * 4
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=10)
    assert len(outputs) == 1
    assert (tmp_path / "made").read_text() == "x"
    left = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(left) == 2, left  # the model and its lock, nothing half made
    load_shard(Path(outputs.pop()), EngineConfig().dims, 0, 1, device="cpu", dtype=torch.float32)


def test_a_maker_that_dies_leaves_nothing_that_looks_complete(tmp_path: Path):
    code = (
        "import os, sys; import engine.assets as a, engine.seeded as s; from engine.config import EngineConfig\n"
        "make = s.make_generator\n"
        "def dies(file, dims, seed):\n"
        "    make(file, dims, seed); os.kill(os.getpid(), 9)\n"
        "s.make_generator = dies\n"
        "a.generator_checkpoint(EngineConfig().replace(model__cache_dir=sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == -9
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert len(list(tmp_path.glob(".*.part"))) == 1
    # The lock went with its holder, and the next maker clears up.
    assert generator_checkpoint(EngineConfig().replace(model__cache_dir=str(tmp_path))).is_file()
    assert not list(tmp_path.glob(".*.part"))


def test_bench_has_the_wide_text_of_the_real_models(tmp_path: Path):
    config = EngineConfig().replace(model__preset="bench", model__cache_dir=str(tmp_path))
    encoder = TextEncoder.load(text_encoder_dir(config), 512, device="cpu", dtype=torch.float32)
    embeds = encoder.encode("a small boat").embeds_1LD
    assert embeds.shape == (1, 512, 4096)
    assert 0.5 < float(embeds[:, :2].std()) < 2
    state, _ = load_shard(generator_checkpoint(config), config.dims, 1, 8, device="cpu", dtype=torch.bfloat16)
    assert state["blocks.7.ffn.0.weight"].shape == (256, 512)
    assert not list(tmp_path.glob("*-vae"))


def test_given_paths_are_taken_as_they_are(config: EngineConfig, tmp_path: Path):
    paths = all_paths(config)
    given = config.replace(
        model__checkpoint=str(paths.checkpoint),
        model__text_encoder=str(paths.text_encoder),
        model__vae=str(paths.vae),
        model__cache_dir=str(tmp_path / "unused"),
    )
    assert all_paths(given) == paths
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    ("key", "find", "kind"),
    [
        ("checkpoint", generator_checkpoint, WeightsError),
        ("text_encoder", text_encoder_dir, CodecError),
        ("vae", vae_dir, CodecError),
    ],
)
def test_a_real_preset_needs_paths_that_exist(tmp_path: Path, key: str, find, kind: type[Exception]):
    config = from_dict({"model": {"preset": "wan2.1-1.3b"}})
    with pytest.raises(kind, match=rf"wan2\.1-1\.3b needs model\.{key}: .*safetensors"):
        find(config)
    missing = config.replace(**{f"model__{key}": str(tmp_path / "no")})
    with pytest.raises(kind, match=f"model.{key} is {tmp_path}/no, and there is nothing"):
        find(missing)


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WeightsError, match="cannot write") as caught:
        generator_checkpoint(EngineConfig().replace(model__cache_dir=str(tmp_path / "file" / "cache")))
    assert "model.cache_dir" in caught.value.next_step


def test_command_line_errors_carry_code_and_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write_config(tmp_path, tmp_path, 'preset = "wan2.1-14b"\n')
    with pytest.raises(SystemExit) as caught:
        main(["--config", str(file)])
    assert caught.value.code == 77
    assert "TP-4001: preset wan2.1-14b needs model.checkpoint" in capsys.readouterr().err
