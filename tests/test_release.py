"""A release: the lists of what is in the images, the script that makes the files, and the forge's workflows."""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import calmclip
from calmclip.models.ops.library import Library
from calmclip.service.deploy import sbom
from tests import aarch64
from tests.process import installed

ROOT = Path(__file__).parents[1]
SCRIPT = Path("service/deploy/release.sh")
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
STEPS = ["packages", "wheels", "bundle", "images", "sboms", "sums", "sign", "verify"]
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # sha256 of "abc" (FIPS 180-4)


def licences(component: dict[str, Any]) -> list[str]:
    return [entry["license"].get("id") or entry["license"]["name"] for entry in component["licenses"]]


def test_a_package_has_the_hash_that_pip_reported_and_the_licence_of_its_files(tmp_path: Path) -> None:
    """pip's report is the one of `pip install --report`; names are spelt in three ways."""
    text = tmp_path / "zope_like-1.0.dist-info" / "licenses" / "LICENSE.txt"
    text.parent.mkdir(parents=True)
    text.write_text("Do what you like.")
    other = tmp_path / "zope_like_more-1.0.dist-info" / "LICENSE"
    other.parent.mkdir()
    other.write_text("Of another package.")
    reported = {
        "metadata": {"name": "Zope.Like", "version": "1.0"},
        "download_info": {"url": "https://index/zope.whl", "archive_info": {"hashes": {"sha256": ABC}}},
    }
    named = {"name": "named", "licenses": [{"license": {"id": "MIT"}}]}
    components: list[dict[str, Any]] = [{"name": "zope-like"}, named]
    sbom.with_wheels(components, sbom.wheels([{"install": [reported]}]), tmp_path)
    assert components[0]["hashes"] == [{"alg": "SHA-256", "content": ABC}]
    assert [entry["license"]["text"]["content"] for entry in components[0]["licenses"]] == ["Do what you like."]
    assert licences(named) == ["MIT"]
    assert sbom.gaps({"components": components}) == ["named has no hashes"]


def test_a_debian_package_has_the_licences_of_its_copyright_file(tmp_path: Path) -> None:
    files = {
        "zlib1g": "Files: *\nLicense: Zlib\n\nFiles: a\nLicense: Zlib\n\nFiles: b\nLicense: GPL-2+ or Artistic\n",
        "old": "This package was debianized by hand. It is in the public domain.\n",
    }
    for name, text in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "copyright").write_text(text)
    names = [*files, "zlib"]
    purls = {"zlib": "pkg:deb/debian/zlib@1.3?arch=source"}
    components: list[dict[str, Any]] = [
        {"name": n, "purl": purls.get(n, ""), "hashes": [sbom.sha256(ABC)]} for n in names
    ]
    sbom.with_copyright(components, tmp_path)
    assert licences(components[0]) == ["GPL-2+ or Artistic", "Zlib"]
    assert components[1]["licenses"][0]["license"]["text"]["content"] == files["old"]
    assert sbom.gaps({"components": components}) == []  # a source package is no file of the image


def test_a_bundle_is_a_model_with_its_files_its_licence_and_its_weights(tmp_path: Path) -> None:
    """CycloneDX 1.6: a component of the type machine-learning-model, with `components` and `pedigree.ancestors`."""
    (tmp_path / "mini-int8").mkdir()
    manifest = {
        "name": "mini-int8",
        "source": {
            "model": "two towers", "license": "Apache-2.0", "notes": "From photographs.",
            "weights": {"towers-model==0.1.0/towers.safetensors": ABC, "heads.safetensors": ABC},
        },
        "files": {"text.onnx": {"sha256": ABC, "bytes": 3}},
    }  # fmt: skip
    content = json.dumps(manifest)
    (tmp_path / "mini-int8" / "bundle.json").write_text(content)
    (model,) = sbom.bundles(tmp_path)
    assert (model["type"], model["name"], licences(model)) == ("machine-learning-model", "mini-int8", ["Apache-2.0"])
    assert model["hashes"][0]["content"] == hashlib.sha256(content.encode()).hexdigest()
    (file,) = model["components"]
    assert (file["name"], file["hashes"], licences(file)) == ("text.onnx", [sbom.sha256(ABC)], ["Apache-2.0"])
    ancestors = {weights["name"]: weights.get("purl") for weights in model["pedigree"]["ancestors"]}
    assert ancestors == {"towers.safetensors": "pkg:pypi/towers-model@0.1.0", "heads.safetensors": None}
    assert sbom.gaps({"components": [model]}) == []


def test_the_interpreter_and_the_op_library_are_components(tmp_path: Path) -> None:
    python = sbom.cpython(Path(sys.executable))
    assert python["version"] == ".".join(map(str, sys.version_info[:3]))
    assert python["hashes"][0]["content"] == hashlib.sha256(Path(sys.executable).resolve().read_bytes()).hexdigest()
    library = tmp_path / "calmclip/models/ops/lib/libcalmclip.so"
    library.parent.mkdir(parents=True)
    library.write_text("abc")
    (part,) = sbom.op_library(tmp_path)
    assert (part["name"], part["hashes"]) == ("calmclip/models/ops/lib/libcalmclip.so", [sbom.sha256(ABC)])


DOCKER = r"""#!/bin/sh
# Does what release.sh asks of Docker, without Docker, and notes each call.
echo "$*" >>CALLS
for last; do :; done
case "$*" in
  *--output*)
    made=$(echo "$*" | sed 's/.*dest=\([^ ]*\).*/\1/')/bundles/mini-int8
    mkdir -p "$made" && echo {} >"$made/bundle.json" ;;
  save*) echo "layers of $last" ;;
  create*) echo "$last" ;;
  cp*) echo "out of $3" >"$last" ;;
esac
"""


class Release:
    """A small repository with the script, a stand-in for Docker, and a key whose public half may sign."""

    def __init__(self, folder: Path) -> None:
        for program in ("git", "ssh-keygen", "tar"):
            installed(program, "the script that makes a release")
        self.tree, self.dist, programs = folder / "tree", folder / "tree" / "dist", folder / "programs"
        (self.tree / SCRIPT.parent).mkdir(parents=True)
        (self.tree / "calmclip").mkdir()
        programs.mkdir()
        (self.tree / SCRIPT).write_bytes((ROOT / SCRIPT).read_bytes())
        (self.tree / "calmclip/__init__.py").write_text('"""."""\n\n__version__ = "7.8.9"\n')
        (self.tree / ".gitignore").write_text("/dist/\n/build/\n")
        docker = programs / "docker"
        docker.write_text(DOCKER.replace("CALLS", str(folder / "calls")))
        docker.chmod(0o755)
        self.calls, self.key = folder / "calls", self.make_key(folder / "key")
        signer = f'release@calmclip namespaces="calmclip-release" {self.key.with_suffix(".pub").read_text()}'
        (self.tree / SCRIPT.with_name("allowed_signers")).write_text(signer)
        self.environment = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(folder)}
        self.git("init", "--quiet")
        self.git("add", "--all")
        self.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "A release")

    def make_key(self, file: Path) -> Path:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)
        return file

    def git(self, *words: str) -> None:
        subprocess.run(["git", *words], cwd=self.tree, env=self.environment, check=True)

    def run(self, *steps: str, key: Path | None = None) -> tuple[int, str]:
        """-> exit status, standard error"""
        environment = self.environment | ({"RELEASE_KEY": str(key)} if key else {})
        command = ["bash", str(SCRIPT), *steps]
        done = subprocess.run(command, cwd=self.tree, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return Release(tmp_path)


def test_one_command_makes_signed_files_of_both_images_for_both_processors(release: Release) -> None:
    steps = [step for step in STEPS if step not in ("packages", "wheels")]
    assert release.run(*steps, key=release.key) == (0, "")
    images = [f"calmclip-7.8.9-{i}-{p}" for i in ("service", "export") for p in ("amd64", "arm64")]
    wanted = {f"{image}.{kind}" for image in images for kind in ("docker.tar.gz", "python.cdx.json", "debian.cdx.json")}
    wanted |= {"calmclip-7.8.9-mini-int8.tar.gz", "SHA256SUMS", "SHA256SUMS.sig"}
    assert {file.name for file in release.dist.iterdir()} == wanted
    sums = dict(reversed(line.split("  ")) for line in (release.dist / "SHA256SUMS").read_text().splitlines())
    assert sums.keys() == wanted - {"SHA256SUMS", "SHA256SUMS.sig"}
    for name, digest in sums.items():
        assert hashlib.sha256((release.dist / name).read_bytes()).hexdigest() == digest

    builds = [line.split() for line in release.calls.read_text().splitlines() if line.startswith("buildx ")]
    made, *over = builds  # one export on this processor; every image is built over its bundle
    assert "--platform" not in made
    assert {call[call.index("--platform") + 1] for call in over} == {"linux/amd64", "linux/arm64"}
    assert {call[call.index("--build-context") + 1] for call in over} == {f"bundle={release.tree}/build/release/bundle"}
    list_of_arm = (release.dist / "calmclip-7.8.9-export-arm64.python.cdx.json").read_text()
    assert list_of_arm == "out of calmclip-export:7.8.9-arm64:/usr/share/sbom/python.cdx.json\n"

    archive = release.dist / "calmclip-7.8.9-mini-int8.tar.gz"
    with tarfile.open(archive) as files:
        assert files.getnames() == ["mini-int8", "mini-int8/bundle.json"]
    assert release.run(*steps, key=release.key) == (0, "")  # again
    again = dict(reversed(line.split("  ")) for line in (release.dist / "SHA256SUMS").read_text().splitlines())
    assert again[archive.name] == sums[archive.name]


def test_a_changed_file_and_a_foreign_signature_are_refused(release: Release, tmp_path: Path) -> None:
    assert release.run("bundle", "sums", "sign", "verify", key=release.key)[0] == 0
    bundle, sums = release.dist / "calmclip-7.8.9-mini-int8.tar.gz", release.dist / "SHA256SUMS"
    content = bundle.read_bytes()
    bundle.write_bytes(content + b" ")
    status, error = release.run("verify")
    assert (status, "a file of dist/ has changed" in error) == (1, True)
    bundle.write_bytes(content)
    assert release.run("verify") == (0, "")
    sums.write_text(sums.read_text().replace("a", "b"))
    status, error = release.run("verify")
    assert (status, "SHA256SUMS.sig is not by a key of service/deploy/allowed_signers" in error) == (1, True)
    status, error = release.run("sums", "sign", "verify", key=release.make_key(tmp_path / "foreign"))
    assert (status, "add the public half of RELEASE_KEY there" in error) == (1, True)


def test_what_is_missing_is_said_before_anything_is_made(release: Release) -> None:
    assert release.run() == (1, "release: RELEASE_KEY is '', expected the file of a private SSH key\n")
    status, error = release.run("image")
    assert (status, "the steps are packages, wheels, bundle, images" in error) == (1, True)
    assert release.run("wheels")[1] == "release: there is no wheel; run the step packages first\n"
    assert release.run("images")[1] == "release: there is no bundle; run the step bundle first\n"
    (release.tree / "calmclip/more.py").touch()
    assert "changes that are not committed" in release.run("bundle")[1]
    assert not list(release.dist.glob("*"))


@pytest.mark.slow  # a virtual environment with the pinned tools, twice: a minute
def test_the_packages_of_a_release_are_the_same_twice(tmp_path: Path, library: Library) -> None:
    """sdist and wheels of this checkout as it is, made in two places. Docker's part is done by copies of the libraries
    that these tests use."""
    if reason := aarch64.why_not():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    repository, programs, libraries = (tmp_path / name for name in ("repository", "programs", "libraries"))
    for machine, folder in {platform.machine(): library.path.parent, "aarch64": aarch64.library()}.items():
        shutil.copytree(folder, libraries / machine)
    programs.mkdir()
    (programs / "docker").write_text(f"#!/bin/sh\ncp -r {libraries} $PWD/build/release/libraries\n")
    (programs / "docker").chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    git = ["git", f"--git-dir={repository}", f"--work-tree={ROOT}"]
    for words in (["init"], ["add", "--all"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--message=All"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    digests = []
    for name in ("first", "second"):
        tree = tmp_path / name
        subprocess.run(["git", "clone", "--quiet", str(repository), str(tree)], check=True)
        subprocess.run(["bash", str(SCRIPT), "packages", "wheels", "sums"], cwd=tree, env=environment, check=True)
        digests.append((tree / "dist/SHA256SUMS").read_text())
    assert digests[0] == digests[1]
    names = {line.split("  ")[1] for line in digests[0].splitlines()}
    wheels = {f"-py3-none-{name}.whl" for name in ("any", "manylinux_2_28_x86_64", "manylinux_2_28_aarch64")}
    version = f"calmclip-{calmclip.__version__}"
    assert {name.removeprefix(version) for name in names} == {".tar.gz"} | wheels


def test_workflows_run_verbs_of_this_repository_and_nothing_else() -> None:
    assert {file.name for file in WORKFLOWS} == {"ci.yml", "release.yml"}
    for file in WORKFLOWS:
        for job in yaml.safe_load(file.read_text())["jobs"].values():
            for command in (step["run"] for step in job["steps"] if "run" in step):
                words = shlex.split(command)
                if words != [".ci/run"]:
                    verb, target, *variables = words
                    assert (verb, target in TARGETS) == ("make", True), command
                    assert {variable.partition("=")[0] for variable in variables} <= {"STEPS"}
                    assert set(variables[0].partition("=")[2].split()) < set(STEPS)
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_workflows_have_pinned_actions_few_rights_a_limit_of_time_and_no_secret() -> None:
    for file in WORKFLOWS:
        text = file.read_text()
        workflow = yaml.safe_load(text)
        assert workflow["permissions"] == {"contents": "read"}
        assert "secrets." not in text
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"] <= 180
            assert "permissions" not in job
            uses = [step["uses"] for step in job["steps"] if "uses" in step]
            assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in uses), uses
            assert all(re.search(rf"{action} # v\d+\.\d+\.\d+$", text, re.MULTILINE) for action in uses)


def test_every_verb_of_the_checklist_exists() -> None:
    page = (ROOT / "docs/releasing.md").read_text()
    assert {"test-slow", "release"} <= set(re.findall(r"`make ([a-z-]+)", page)) <= TARGETS
    assert all(step in STEPS for text in re.findall(r'STEPS="([^"]+)"', page) for step in text.split())
    assert all((ROOT / path).exists() for path in re.findall(r"`(service/deploy/[\w.]+)`", page))
