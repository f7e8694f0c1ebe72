"""Every documented command is known to `.ci/commands.py`, which runs them."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("ci_commands", ROOT / ".ci" / "commands.py")
assert spec is not None
assert spec.loader is not None
commands = importlib.util.module_from_spec(spec)
spec.loader.exec_module(commands)

DOCUMENT = """Text with `a_name`, `make it  # not` and, over
two lines, `python some/script.py
--flag`.

```bash
pip install x    # because
one --long \\
    --command
```

    python other/script.py --a 1   # why

`other/script.py --b 2`, `train --all`, `train`

```python
import x  # `make nothing`
```
"""


def test_what_is_documented_is_what_is_known():
    assert commands.differences() == []


def test_commands_are_found_in_blocks_in_indented_lines_and_in_text():
    assert commands.commands_in(DOCUMENT) == [
        "make it",
        "python some/script.py --flag",
        "pip install x",
        "one --long --command",
        "python other/script.py --a 1",
        "other/script.py --b 2",
        "train --all",
    ]


def test_a_command_that_is_new_and_one_that_is_gone_are_reported(monkeypatch):
    monkeypatch.setattr(commands, "documented", lambda: {ROOT / "README.md": ["make tea"]})
    monkeypatch.setattr(commands, "COMMANDS", {"make coffee": "nobody drinks it"})
    assert commands.differences() == [
        "README.md has a command that is not in COMMANDS; add it there: make tea",
        "no document has this command of COMMANDS any more; remove it: make coffee",
    ]


def test_commands_are_run_with_placeholders_filled_and_their_program(monkeypatch):
    known = {
        "train --k 8 ...": commands.Run("--steps 2", {"...": "--d_in 4"}),
        "study/run.py --config tiny": commands.Run(),
        "eval/study/run.py --dry-run": commands.Run(),
    }
    monkeypatch.setattr(commands, "COMMANDS", known)
    assert [commands.what_is_run(command) for command in known] == [
        "sae-lens-sampled train --k 8 --d_in 4 --steps 2",
        "python eval/study/run.py --config tiny",
        "python eval/study/run.py --dry-run",
    ]
