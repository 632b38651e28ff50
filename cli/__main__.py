"""`python -m kimi_k26.cli`, the same as `kimi-k26`."""

import sys

from . import main

sys.exit(main())
