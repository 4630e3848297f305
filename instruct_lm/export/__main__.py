"""Export a run or a base model: `python -m instruct_lm.export --help`."""

from instruct_lm.commands.export import main
from instruct_lm.commands.hydra_app import hydra_command

if __name__ == "__main__":
    with hydra_command("export", main) as run:
        run()
