"""Write what pip installs for an image: the requirements of some dependency groups and extras of ``pyproject.toml``.

``python requirements.py IMAGE NAME...`` writes ``IMAGE.txt``; the name ``project`` stands for the project's own dependencies.
"""

import sys
import tomllib
from pathlib import Path

image, *names = sys.argv[1:]
document = tomllib.loads(Path("pyproject.toml").read_text())
known = {"project": document["project"]["dependencies"]}
known |= document["project"]["optional-dependencies"] | document["dependency-groups"]
if unknown := [name for name in names if name not in known]:
    sys.exit(f"{', '.join(unknown)} given; allowed: {', '.join(known)}")
Path(f"{image}.txt").write_text("".join(f"{line}\n" for name in names for line in known[name]))
