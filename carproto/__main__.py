"""Let `python -m carproto` be the command `carproto`."""
import sys

from carproto.cli import main

sys.exit(main())
