"""`python -m svg.cli`."""

import sys

from .app import main

sys.exit(main())
