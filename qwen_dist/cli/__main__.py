"""`python -m qwen_dist.cli` is `qwen-dist`."""

import sys

from qwen_dist.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
