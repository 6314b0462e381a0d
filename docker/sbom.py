"""Write the bill of materials of an image as CycloneDX JSON: Python's packages, by cyclonedx-py, and Debian's, by dpkg.

``python sbom.py IMAGE TREE`` writes ``TREE/share/sbom/image.cdx.json``. The project itself is the image's own, no part of it.
"""

import json
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

FIELDS = ("${db:Status-Abbrev}", "${Package}", "${Version}", "${Architecture}")


def python_packages() -> dict:
    """The document that cyclonedx-py makes of ``/opt/venv``."""
    tool = [str(Path(sys.executable).parent / "cyclonedx-py"), "environment", "--output-reproducible", "/opt/venv/bin/python"]
    return json.loads(subprocess.run(tool, check=True, stdout=subprocess.PIPE).stdout)


def debian_packages() -> list[dict]:
    """Components of what the base image has installed (https://github.com/package-url/purl-spec, type deb)."""
    listed = subprocess.run(
        ["dpkg-query", "--show", "--showformat", "\t".join(FIELDS) + "\n"], check=True, stdout=subprocess.PIPE
    )
    rows = [line.split("\t") for line in listed.stdout.decode().splitlines() if line.startswith("ii")]
    return [
        {
            "type": "library",
            "bom-ref": f"deb:{name}:{architecture}",
            "name": name,
            "version": version,
            "purl": f"pkg:deb/debian/{quote(name)}@{quote(version, safe='')}?arch={architecture}",
        }
        for _, name, version, architecture in rows
    ]


image, folder = sys.argv[1], Path(sys.argv[2], "share", "sbom")
document = python_packages()
document["components"] += debian_packages()
document["metadata"]["component"] = {"type": "container", "bom-ref": image, "name": image}
folder.mkdir(parents=True, exist_ok=True)
(folder / "image.cdx.json").write_text(json.dumps(document, indent=1))
