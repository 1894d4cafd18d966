"""The operator's command line. Never imports torch: ranks are processes, and the engine speaks through files."""

from engine import __version__ as __version__
