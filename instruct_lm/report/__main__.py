"""Compare evaluations: `python -m instruct_lm.report --help`."""

import sys

from instruct_lm.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
