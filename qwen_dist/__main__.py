"""`python -m qwen_dist` is `qwen-dist`."""

import sys

from qwen_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
