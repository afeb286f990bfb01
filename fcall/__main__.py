"""``python -m fcall``: see :mod:`fcall.cli`."""

import sys

from fcall.cli import main

if __name__ == "__main__":
    sys.exit(main())
