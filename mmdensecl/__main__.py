# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""`python -m mmdensecl`."""

import sys

from .cli import main

sys.exit(main())
