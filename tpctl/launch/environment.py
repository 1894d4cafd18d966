"""The environment that ranks are started in."""

from __future__ import annotations

import os
from collections.abc import Mapping

from engine.config import dotted_keys

FIXED: dict[str, str] = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}


def rank_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours with the fixed values. `TPCTL_SECTION_KEY` variables are left out: the configuration file that ranks get
    has them resolved already, and a second reading could resolve them differently."""
    consumed = {"TPCTL_" + dotted.replace(".", "_").upper() for dotted in dotted_keys()}
    kept = {key: value for key, value in (os.environ if environ is None else environ).items() if key not in consumed}
    return kept | FIXED
