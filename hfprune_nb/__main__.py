"""`python -m hfprune_nb`: the command line of a checkout that is not installed."""

import sys

from hfprune_nb.cli.main import main

sys.exit(main())
