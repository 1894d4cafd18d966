"""A small real tokenizer: Unigram, trained on the text below, with UMT5's special tokens and byte fallback."""

from __future__ import annotations

import json
from pathlib import Path

_PAD, _EOS, _UNK = "<pad>", "</s>", "<unk>"
_PIECES = 420
_ABSENT_SCORE = -14.0  # printable characters that the text lacks
_BYTE_SCORE = -20.0  # a byte is the last resort

_CORPUS = """
A small boat drifts on a calm lake at sunrise while mist rises slowly from the water.
A red fox walks over fresh snow, stops, and looks straight into the camera.
The same street at night, wet with rain, with neon signs mirrored in the puddles.
Waves break against black rocks below a white lighthouse under heavy grey clouds.
Close up of an old woman laughing, soft window light, shallow depth of field.
A train crosses a long stone bridge above a green valley, seen from the air.
Two children run through tall yellow grass with a kite behind them in the wind.
A cat sleeps on a warm windowsill; outside the leaves fall one by one.
Time lapse of a city from day to dusk, cars leaving trails of red and white light.
An astronaut floats past a large blue planet, slow motion, deep black sky with stars.
A chef cuts vegetables quickly on a wooden board, steam rising from a pan beside her.
The camera moves forward through a dark forest, and rays of sun fall between the trees.
A horse gallops along the beach, splashing through shallow water at golden hour.
A glass of water tips over in slow motion and the drops scatter across a table.
Snow falls on a quiet village, with smoke from the chimneys and lamps in the windows.
A dancer in a blue dress turns on an empty stage under a single spotlight.
An aerial view of a river winding through desert canyons toward distant mountains.
A robot walks down a busy market street as people turn around to look at it.
Fireworks open above the harbor and their colors shine on the moving sea.
A paper lantern rises into the evening sky, followed by hundreds of others.
A dog shakes water from its fur, every drop frozen in bright morning light.
Hand drawn animation of a girl riding a bicycle through a field of flowers.
A volcano erupts in the distance while birds fly across the foreground.
A vintage car drives along a coast road, filmed from the side, smooth tracking shot.
Underwater scene: a turtle swims over a coral reef among schools of small fish.
The photo turns to black and white, high contrast, film grain, a cinematic style.
A realistic portrait of a man with glasses reading a newspaper in a cafe.
Wide shot of a wheat field at noon; a storm is coming from the left side.
A candle flame flickers, its shadow trembling on the wall behind an open book.
A spaceship lands on a red planet and raises a cloud of dust, high detail, 4k.
""".strip()


def build_tokenizer(directory: Path) -> int:
    """Train, write `tokenizer.json` and `tokenizer_config.json`, and return the number of ids."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = _vocabulary()
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)]
    )
    tokenizer.add_special_tokens([_PAD, _EOS, _UNK])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {_EOS}", pair=f"$A {_EOS} $B {_EOS}", special_tokens=[(_EOS, 1)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": _PAD,
        "eos_token": _EOS,
        "unk_token": _UNK,
        "padding_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    return len(vocabulary)


def _vocabulary() -> list[tuple[str, float]]:
    """The trained pieces, then every printable character, then every byte: no text is unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    learner.train_from_iterator(
        _CORPUS.splitlines(),
        trainers.UnigramTrainer(
            vocab_size=_PIECES, special_tokens=[_PAD, _EOS, _UNK], unk_token=_UNK, show_progress=False
        ),
    )
    specials = [(piece, 0.0) for piece in (_PAD, _EOS, _UNK)]
    # Two things differ from run to run and are no result: the last digits of the scores (parallel sums), and the order
    # in which letters that no piece needs alone share the lowest scores, a step of 0.0001 each.
    learned = json.loads(learner.to_str())["model"]["vocab"][len(specials) :]
    floor = min(score for _, score in learned) + 0.02
    scores = {
        piece: _ABSENT_SCORE if len(piece) == 1 and score < floor else round(score, 6) for piece, score in learned
    }
    pieces = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    absent = [(chr(code), _ABSENT_SCORE) for code in range(33, 127) if chr(code) not in scores]
    return specials + pieces + absent + [(f"<0x{byte:02X}>", _BYTE_SCORE) for byte in range(256)]
