"""`python -m pvt_fast` is the command `pvt-fast`."""

import sys

from .cli import main

sys.exit(main())
