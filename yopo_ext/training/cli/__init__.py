"""The command line: `yopo-ext train | evaluate | compare | export`."""

from yopo_ext.training.cli.main import main

__all__ = ["main"]
