"""`python -m prefloop.cli`, the same as `prefloop`."""

import sys

from prefloop.cli import main

sys.exit(main())
