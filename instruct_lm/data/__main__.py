"""Show what the model sees: `python -m instruct_lm.data --help`."""

import sys

from instruct_lm.commands.show_data import main

if __name__ == "__main__":
    sys.exit(main())
