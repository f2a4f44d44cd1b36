"""`python -m yopo_ext` is the command `yopo-ext`."""

import sys

from yopo_ext.training.cli.main import main

sys.exit(main())
