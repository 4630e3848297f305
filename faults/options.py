"""What the command line of `python -m faults` chooses."""

import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What to try, and where.

    Args:
        work: A folder for the runs.
        count: SIGKILLs.
        inputs: Hostile files.
        seed: Of all that is random.
        only: Faults whose names begin so; "": all.
        jobs: Commands at a time.
        keep: Whether the folders of runs that ended well stay too.
    """

    work: Path
    count: int = 200
    inputs: int = 20_000
    seed: int = 1
    only: str = ""
    jobs: int = 2
    keep: bool = False

    def wants(self, name: str) -> bool:
        """Whether a fault, or one whose name goes on from `name`, is to be tried."""
        return name.startswith(self.only) or self.only.startswith(name)

    def discard(self, folder: Path) -> None:
        """Delete a folder that nobody needs to look at."""
        if not self.keep:
            shutil.rmtree(folder, ignore_errors=True)
