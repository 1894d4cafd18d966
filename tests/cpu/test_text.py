"""The text encoder against transformers' own UMT5 with a padded batch, and the prompts that are not ordinary."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.assets import text_encoder_dir
from engine.codecs.text import TextEncoder, clean
from engine.config import EngineConfig
from engine.errors import CodecError

TEXT_LEN = 32
PROMPT = "a small boat on a calm lake at sunrise"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_encoder_dir(EngineConfig().replace(model__cache_dir=str(tmp_path_factory.mktemp("cache"))))


@pytest.fixture(scope="module")
def encoder(directory: Path) -> TextEncoder:
    return TextEncoder.load(directory, TEXT_LEN, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(directory: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def test_equals_the_padded_encoder_with_its_padding_zeroed(directory: Path, encoder: TextEncoder, tokenizer):
    from transformers import UMT5EncoderModel

    model = UMT5EncoderModel.from_pretrained(directory).eval()
    batch = tokenizer(PROMPT, padding="max_length", max_length=TEXT_LEN, return_tensors="pt")
    with torch.no_grad():
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    tokens = int(batch["attention_mask"].sum())
    assert 5 < tokens < TEXT_LEN
    found = encoder.encode(PROMPT)
    assert found.num_tokens == tokens
    assert found.embeds_1LD.shape == (1, TEXT_LEN, 32)
    torch.testing.assert_close(found.embeds_1LD[:, :tokens], hidden[:, :tokens], atol=2e-6, rtol=0)
    assert not found.embeds_1LD[:, tokens:].any()
    assert not found.truncated


def test_conditioning_is_of_order_one_and_differs_by_prompt(encoder: TextEncoder):
    one, same, other = (encoder.encode(p).embeds_1LD for p in (PROMPT, PROMPT, "a red fox at night in the snow"))
    assert torch.equal(one, same)
    assert float((one - other).abs().mean()) > 0.2
    tokens = encoder.encode(PROMPT).num_tokens
    assert 0.5 < float(one[:, :tokens].std()) < 2


def test_order_of_words_matters(encoder: TextEncoder):
    one = encoder.encode("a dog behind a horse").embeds_1LD
    two = encoder.encode("a horse behind a dog").embeds_1LD
    assert float((one - two).abs().max()) > 0.1


@pytest.mark.parametrize("spaced", [f"  {PROMPT}\n", PROMPT.replace(" ", " \t\n  ")])
def test_white_space_does_not_matter(encoder: TextEncoder, spaced: str):
    assert torch.equal(encoder.encode(spaced).embeds_1LD, encoder.encode(PROMPT).embeds_1LD)


def test_cleaning_undoes_entities_as_wan_does():
    assert clean(" salt &amp;amp; pepper&#33;\n\n now ") == "salt & pepper! now"


def test_a_long_prompt_is_cut_and_says_so(encoder: TextEncoder, tokenizer):
    long = " ".join(["snow"] * 100)
    found = encoder.encode(long)
    assert found.truncated
    assert found.num_tokens == TEXT_LEN
    # The end token stays: the encoder was trained to see it.
    ids = tokenizer(long, truncation=True, max_length=TEXT_LEN)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert torch.equal(found.embeds_1LD, encoder.encode(long + " and more").embeds_1LD)


def test_the_limit_is_exact(encoder: TextEncoder, tokenizer):
    # "," is one token wherever it stands; one more is the start of the text and one the end.
    def prompt(commas: int) -> str:
        return "snow" + "," * commas

    base = len(tokenizer(prompt(0))["input_ids"])
    full = prompt(TEXT_LEN - base)
    assert len(tokenizer(full)["input_ids"]) == TEXT_LEN
    assert encoder.encode(full).num_tokens == TEXT_LEN
    assert not encoder.encode(full).truncated
    assert encoder.encode(full + ",").truncated


def test_any_text_has_tokens_of_its_own(encoder: TextEncoder, tokenizer):
    for text in ("狐狸", "лиса", "🦊", "a{b}|~"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids, text
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert not torch.equal(encoder.encode("狐狸").embeds_1LD, encoder.encode("лиса").embeds_1LD)


def test_an_empty_prompt_is_the_end_token_alone(encoder: TextEncoder):
    found = encoder.encode("   ")
    assert found.num_tokens == 1
    assert found.embeds_1LD[:, 0].any()


def test_bfloat16(directory: Path, encoder: TextEncoder):
    half = TextEncoder.load(directory, TEXT_LEN, device="cpu", dtype=torch.bfloat16).encode(PROMPT)
    assert half.embeds_1LD.dtype == torch.bfloat16
    torch.testing.assert_close(half.embeds_1LD.float(), encoder.encode(PROMPT).embeds_1LD, atol=0.15, rtol=0)


def test_a_pipeline_with_its_tokenizer_in_a_directory_of_its_own(tmp_path: Path, directory: Path, encoder: TextEncoder):
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / part).mkdir()
    for file in directory.iterdir():
        shutil.copy(file, tmp_path / ("tokenizer" if file.name.startswith("tokenizer") else "text_encoder"))
    for path in (tmp_path, tmp_path / "text_encoder"):
        loaded = TextEncoder.load(path, TEXT_LEN, device="cpu", dtype=torch.float32)
        assert torch.equal(loaded.encode(PROMPT).embeds_1LD, encoder.encode(PROMPT).embeds_1LD)


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path: Path, directory: Path, gone: str):
    broken = tmp_path / "encoder"
    shutil.copytree(directory, broken)
    (broken / gone).unlink()
    with pytest.raises(CodecError, match="expected config") as caught:
        TextEncoder.load(broken, TEXT_LEN, device="cpu", dtype=torch.float32)
    assert gone in caught.value.evidence["missing_files"]
    assert caught.value.code == "TP-5002"


def test_a_damaged_file_is_an_error(tmp_path: Path, directory: Path):
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CodecError, match="does not load") as caught:
        TextEncoder.load(tmp_path, TEXT_LEN, device="cpu", dtype=torch.float32)
    assert caught.value.code == "TP-5003"


def test_a_layer_that_is_not_in_the_file_is_an_error_not_random_numbers(tmp_path: Path, directory: Path):
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(CodecError, match="lacks") as caught:
        TextEncoder.load(tmp_path, TEXT_LEN, device="cpu", dtype=torch.float32)
    assert any("block.2" in name for name in caught.value.evidence["tensors"])


def test_loading_and_encoding_say_nothing(directory: Path):
    code = (
        "import sys, torch; from pathlib import Path; from engine.codecs.text import TextEncoder\n"
        "e = TextEncoder.load(Path(sys.argv[1]), 32, device='cpu', dtype=torch.float32)\n"
        "assert e.encode('snow ' * 900).truncated"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == ""
    assert done.stderr == ""
