"""What the distribution declares: licences of its dependencies, and its version."""

import re
from importlib.metadata import requires
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def test_every_dependency_is_listed_with_its_licence():
    """`make lint` (deptry) reports dependencies that are missing from the metadata or unused."""
    parsed = list(map(Requirement, requires("sae-lens-sampled")))
    wanted = {r.name for r in parsed if r.marker is None or r.marker.evaluate({"extra": "eval"})}
    rows = re.findall(r"^\| (\S+) \| .* \| (.+) \|$", (ROOT / "THIRD_PARTY.md").read_text(), flags=re.MULTILINE)
    listed = dict(rows[1:])  # after the header
    assert wanted - {"sae-bench"} <= listed.keys() <= wanted | {"sae-bench"}  # not available for every Python version
    assert all(listed.values())


def test_a_release_is_a_version_that_the_changelog_has():
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]["build"]["steps"]
    [check] = [step["run"] for step in steps if "CHANGELOG" in step.get("run", "")]
    assert "__version__" in check
    version = re.search(r'__version__ = "(.+)"', (ROOT / "sae_lens_sampled" / "__init__.py").read_text())[1]
    assert re.search(rf"^## {re.escape(version)} \(", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
