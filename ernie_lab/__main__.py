"""`python -m ernie_lab`."""

import sys

from ernie_lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
