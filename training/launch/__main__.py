"""`python -m training.launch`: one node's launcher."""

import sys

from training.launch.command import main

if __name__ == "__main__":
    sys.exit(main())
