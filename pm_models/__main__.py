"""``python -m pm_models`` is ``pm-vit``, for launchers that start modules."""

import sys

from .cli import main

sys.exit(main())
