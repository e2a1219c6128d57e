"""Let `python -m carproto` be the command `carproto`."""
import sys

from carproto.app.cli import main

sys.exit(main())
