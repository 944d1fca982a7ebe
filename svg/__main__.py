"""`python -m svg`, the program `svg`."""

import sys

from .cli import main

sys.exit(main())
