"""The text encoder: a prompt in, the conditioning that the generator reads out.

Letters in names: L text positions, D text width, N tokens of one prompt.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.codecs.quiet import quiet
from engine.errors import CodecError

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
WEIGHTS_FILES = ("model.safetensors", "model.safetensors.index.json")
_EXPECTED = (
    "expected config.json and model.safetensors (or model.safetensors.index.json) in it or in its directory "
    "text_encoder, and tokenizer.json or spiece.model beside them or in a directory tokenizer"
)


@dataclass(frozen=True)
class Conditioning:
    """`embeds_1LD` is zero from position `num_tokens` on; `truncated` says that the prompt did not fit."""

    embeds_1LD: Tensor
    num_tokens: int
    truncated: bool


class TextEncoder:
    """UMT5 and its tokenizer. Build it with `load`."""

    def __init__(self, model: Any, tokenizer: Any, text_len: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.text_len = text_len
        self.text_dim = int(model.config.d_model)

    @classmethod
    def load(cls, path: Path, text_len: int, *, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
        """Load from a directory; nothing is ever fetched.

        Args:
            path: of the encoder, its tokenizer beside it, or of a whole diffusers pipeline.
            text_len: L, the generator's text length; the conditioning is padded to it.

        Raises:
            CodecError: files are missing (it says which are expected where), damaged, or of another model.
        """
        model_dir, tokenizer_dir = _directories(Path(path))
        from transformers import AutoTokenizer, UMT5EncoderModel
        from transformers.utils import logging

        with quiet(logging):
            try:
                tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
                model, report = UMT5EncoderModel.from_pretrained(
                    model_dir, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
                )
            except Exception as error:  # from_pretrained raises whatever its parts raise
                first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise CodecError(
                    f"the text encoder in {model_dir} does not load: {first_line}",
                    code="TP-5003",
                    where=str(path),
                    evidence={"cause": str(error), "type": type(error).__name__},
                    next_step="copy the files again and compare their sizes with the original",
                ) from error
        # transformers fills what is missing with random numbers: plausible, and wrong.
        wrong = sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
        if wrong:
            raise CodecError(
                f"the text encoder in {model_dir} lacks {len(wrong)} tensors: {', '.join(wrong[:5])}",
                code="TP-5004",
                where=str(path),
                evidence={"tensors": wrong},
            )
        return cls(model.to(device).requires_grad_(False).eval(), tokenizer, text_len)

    @torch.no_grad()
    def encode(self, prompt: str) -> Conditioning:
        """Encode one prompt, cleaned as Wan cleans it, cut to `text_len` tokens (the end token stays).

        The encoder runs over the prompt's tokens alone: UMT5 masks padding and knows only relative positions, so that
        padding changes nothing but the time it takes.
        """
        text = clean(prompt)
        ids = self._tokenizer(text, truncation=True, max_length=self.text_len, return_tensors="pt")
        whole = self._tokenizer(text, truncation=False, verbose=False)["input_ids"]
        num_tokens = int(ids["input_ids"].shape[1])
        device = self._model.device
        hidden_1ND = self._model(
            input_ids=ids["input_ids"].to(device), attention_mask=ids["attention_mask"].to(device)
        ).last_hidden_state
        embeds_1LD = hidden_1ND.new_zeros(1, self.text_len, self.text_dim)
        embeds_1LD[:, :num_tokens] = hidden_1ND
        return Conditioning(embeds_1LD, num_tokens, truncated=len(whole) > num_tokens)


def clean(prompt: str) -> str:
    """Wan's cleaning: HTML entities undone (twice, as nested ones occur in captions), runs of white space made one."""
    return " ".join(html.unescape(html.unescape(prompt)).split())


def _directories(path: Path) -> tuple[Path, Path]:
    """Where the encoder and the tokenizer are."""
    model_dir = path if (path / "config.json").is_file() else path / "text_encoder"
    problems = []
    if not (model_dir / "config.json").is_file():
        problems.append("config.json")
    if not any((model_dir / name).is_file() for name in WEIGHTS_FILES):
        problems.append(WEIGHTS_FILES[0])
    places = (path, path / "tokenizer", path.parent / "tokenizer")
    tokenizer_dir = next((place for place in places if any((place / name).is_file() for name in TOKENIZER_FILES)), None)
    if tokenizer_dir is None:
        problems.append(TOKENIZER_FILES[0])
    if problems or tokenizer_dir is None:
        raise CodecError(
            f"no text encoder at {path}: {' and '.join(problems)} missing; {_EXPECTED}",
            code="TP-5002",
            where=str(path),
            evidence={"missing_files": problems},
            next_step="tpctl config check",
        )
    return model_dir, tokenizer_dir
