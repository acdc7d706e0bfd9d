"""`python -m benchmarks.survive`."""

import sys

from benchmarks.survive import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
