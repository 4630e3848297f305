"""Talk to a run: `python -m instruct_lm.chat --help`."""

import sys

from instruct_lm.commands.chat import main

if __name__ == "__main__":
    sys.exit(main())
