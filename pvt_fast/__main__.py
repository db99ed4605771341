"""`python -m pvt_fast` is the command `pvt-fast`."""

import sys

from .cli.main import main

sys.exit(main())
