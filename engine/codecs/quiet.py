"""Loading third-party models without their progress bars and advice: an operator reads this rank's log."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet(logging: Any) -> Iterator[None]:
    """Silence one library while a model loads, and give it back as it was.

    Args:
        logging: `transformers.utils.logging` or `diffusers.utils.logging`.
    """
    verbosity = logging.get_verbosity()
    bars = getattr(logging, "is_progress_bar_enabled", lambda: True)()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
