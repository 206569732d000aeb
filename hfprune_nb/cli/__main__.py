"""`python -m hfprune_nb.cli`: the command line, under the name that scripts of users know."""

import sys

from hfprune_nb.cli.main import main

sys.exit(main())
