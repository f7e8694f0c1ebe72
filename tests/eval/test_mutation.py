"""`eval/mutation.py`: what counts as a mutant, and how its result is identified."""

import json
from dataclasses import replace

import mutation
from mutation import Mutant, _code, _noticeable

SOURCE = '''"""A module."""

def f(x):
    """Twice."""
    return x.to(2, device=x.device)  # doubled
'''


def test_a_mutant_is_known_by_its_code_whatever_its_comments_say():
    mutant = Mutant("scores", SOURCE, "-    return 1\n+    return 2")
    moved = ("def f", "import torch\nfrom ..step import x\n\ndef f")
    for old, new in (("Twice", "Two times"), ("# doubled", ""), ('"""A module."""', ""), moved):
        assert replace(mutant, source=SOURCE.replace(old, new)).key == mutant.key
    assert replace(mutant, source=SOURCE.replace("2, ", "3, ")).key != mutant.key
    assert replace(mutant, module="export").key != mutant.key
    assert mutant.line == "scores: return 2"
    assert "Twice" not in _code(SOURCE)


def test_mutations_invisible_on_a_cpu_are_left_out():
    assert _noticeable("f(x, device=x.device)") == _noticeable("f(x, device=None)") == _noticeable("f(x, )")
    assert _noticeable("zip(a, b, strict=True)") == _noticeable("zip(a, b, strict=False)")
    assert _noticeable("f(x, dim=1)") != _noticeable("f(x, dim=2)")


def test_modules_tests_and_reasons_are_there():
    for module, tests in mutation.MODULES.items():
        assert (mutation.ROOT / mutation.PACKAGE / f"{module}.py").exists()
        assert all((mutation.ROOT / "tests" / f"{name}.py").exists() for name in tests if "test_" in name)
    reasons = json.loads(mutation.REASONS.read_text())
    assert {line.partition(":")[0] for line in reasons} <= mutation.MODULES.keys()
    assert all(len(reason) > 5 for reason in reasons.values())
