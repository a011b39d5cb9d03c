"""``python -m tinyflux``."""

import sys

from tinyflux.cli.main import main

sys.exit(main())
