"""Export a run: `python -m instruct_lm.export --help`."""

import sys

from instruct_lm.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
