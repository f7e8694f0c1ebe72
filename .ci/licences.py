"""Licences of what the package and its extra `eval` require: `python .ci/licences.py > THIRD_PARTY.md`.

Exits with 1 if one is not known to be compatible with MIT, unless it is sae-bench without a stated licence.
"""

import re
import sys
from importlib.metadata import distribution, metadata, requires

from packaging.requirements import Requirement

PERMISSIVE = re.compile(
    r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|Unlicense|Zlib|MPL|Mozilla)\b", re.IGNORECASE
)
"""Licences that a package under MIT may depend on; MPL covers only its own files."""


UNSTATED = "not stated in its metadata"
"""What is shown if none is found; accepted of sae-bench, which the extra `eval` calls and of which nothing is here."""


def licence(package: str) -> str:
    """Licence of an installed package in a few words, by its metadata or else the first line of its licence file."""
    fields = metadata(package)
    if expression := fields.get("License-Expression"):
        return expression
    classifiers = [
        text.rpartition(" :: ")[2] for text in fields.get_all("Classifier", []) if text.startswith("License")
    ]
    stated = (fields.get("License") or "").strip().partition("\n")[0]
    files = [file for file in distribution(package).files or [] if file.name.upper().startswith("LICENSE")]
    in_file = [file.read_text().strip().partition("\n")[0] for file in files]
    return ", ".join(classifiers) or stated or ", ".join(in_file) or UNSTATED


def dependencies(extra: str) -> list[str]:
    """Names of the dependencies of the package itself or of an extra."""
    parsed = list(map(Requirement, requires("sae-lens-sampled") or []))
    needed = {r.name for r in parsed if r.marker is None}
    of_extra = {r.name for r in parsed if r.marker is not None and r.marker.evaluate({"extra": extra})}
    return sorted(of_extra if extra else needed)


def main() -> None:
    print("# What it depends on\n\nRendered by `.ci/licences.py` from the metadata of the installed packages.\n")
    print("| package | for | licence |\n|---|---|---|")
    unknown = []
    for extra in ("", "eval"):
        for name in dependencies(extra):
            text = licence(name)
            print(f"| {name} | {f'the extra `{extra}`' if extra else 'everything'} | {text} |")
            if not PERMISSIVE.search(text) and not (name == "sae-bench" and text == UNSTATED):
                unknown.append(f"{name}: {text}")
    if unknown:
        sys.exit(
            "Not known to be compatible with MIT; check these, and add their licences to PERMISSIVE if they are:\n"
            + "\n".join(unknown)
        )


if __name__ == "__main__":
    main()
