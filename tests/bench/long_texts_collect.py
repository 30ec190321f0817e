"""Long texts with clear licences, from documentation packages of Debian, for `tests.bench.long_texts`.

    python -m tests.bench.long_texts_collect FOLDER [--packages FOLDER] [--each 25] [--skip 0]

The packages are downloaded with apt-get and unpacked into a folder, not installed. Each source of `SOURCES` gives
``--each`` pages of `LENGTHS` characters: those with the smallest SHA-256 of their names, so nobody chose them;
``--skip`` leaves out the first ones, for a second set. The text
of a page is what a reader sees, without navigation. FOLDER gets one .txt file for each page, and SOURCES.tsv: file,
package, version, page, licence, SHA-256 of the text.
"""

import argparse
import gzip
import hashlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

LENGTHS = range(3000, 60_001)  # characters: above twice the built-in model's context
LIST = "SOURCES.tsv"


class Page(NamedTuple):
    name: str
    text: str
    licence: str = ""


Pages = Callable[[Path], Iterator[Page]]


class Source(NamedTuple):
    """``files``: a pattern below the unpacked package; ``licence``: of its copyright file, if the page names
    none; a page without a licence is left out."""

    package: str
    files: str
    pages: Pages
    licence: str


_BLOCKS = "p div h1 h2 h3 h4 h5 h6 li dt dd pre tr table ul ol dl blockquote section title br"


class _Text(HTMLParser):
    """The text of a page's body. Blocks are parted by blank lines, and a table's cells by spaces."""

    BLOCKS = frozenset(_BLOCKS.split())
    HIDDEN = frozenset(["script", "style", "head", "nav", "header", "footer"])
    PARTS = re.compile(r"(nav|sphinxsidebar|related|toc|menu|header|footer|headerlink|searchmenu|fancy_toc)", re.I)
    VOID = frozenset(["br", "hr", "img", "input", "link", "meta", "col", "area", "base", "wbr"])

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.open: list[tuple[str, bool]] = []  # tag, hidden

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BLOCKS:
            self.words.append("\n\n")
        if tag in self.VOID:
            return
        parts = " ".join(value or "" for key, value in attrs if key in ("class", "id", "role"))
        hidden = tag in self.HIDDEN or any(self.PARTS.match(part) for part in parts.split())
        self.open.append((tag, hidden or bool(self.open and self.open[-1][1])))

    def handle_endtag(self, tag: str) -> None:
        if tag in (name for name, _ in self.open):
            while self.open.pop()[0] != tag:
                pass
        if tag in self.BLOCKS:
            self.words.append("\n\n")
        elif tag in ("td", "th"):
            self.words.append(" ")

    def handle_data(self, data: str) -> None:
        if not (self.open and self.open[-1][1]):
            self.words.append(re.sub(r"\s+", " ", data.replace("¶", "")))


def html(file: Path) -> Iterator[Page]:
    parser = _Text()
    parser.feed(file.read_text(encoding="utf-8", errors="replace"))
    yield Page(file.stem, "".join(parser.words))


CHARACTERS = {"bu": "•", "em": "—", "aq": "'"}  # roff's names


def unzipped(file: Path) -> str:
    return gzip.decompress(file.read_bytes()).decode(errors="replace")


def plain(line: str) -> str:
    """A line of roff without fonts, sizes and comments."""
    line = re.sub(r"\\f(\[\w*\]|\(..|.)|\\s[-+]?\d+|\\&|\\c|\\\".*", "", line)
    line = re.sub(r"\\\[(\w+)\]|\\\((\w\w)", lambda m: CHARACTERS.get(m[1] or m[2], ""), line)
    return line.replace(r"\-", "-").replace(r"\e", "\\").replace("\\ ", " ").replace("\\", "")


def roff(file: Path) -> Iterator[Page]:
    """A manual page of the macros `man`: fonts and tables of code are left out."""
    lines, skipped, named = [], False, ""
    for raw in unzipped(file).splitlines():
        if mark := re.search(r"SPDX-License-Identifier: (\S+)", raw):
            named = mark[1]
        line = plain(raw)
        macro, _, rest = line.partition(" ")
        rest = rest.replace('"', "")
        if macro in (".EX", ".nf", ".TS", ".SY"):
            skipped = True
        elif macro in (".EE", ".fi", ".TE", ".YS"):
            skipped = False
        elif skipped or line.startswith(("'", ".TH", '."')):
            continue
        elif macro in (".SH", ".SS"):
            lines.append(f"\n\n{rest.capitalize()}\n\n")
        elif macro in (".PP", ".P", ".LP", ".TP", ".IP", ".TQ", ".HP"):
            lines.append(f"\n\n{'• ' if '•' in rest else ''}")
        elif macro in (".BR", ".RB", ".IR", ".RI", ".BI", ".IB"):
            lines.append(rest.replace(" ", "") if len(rest.split()) < 3 else rest)
            lines.append(" ")
        elif macro in (".B", ".I", ".SM"):
            lines.append(f"{rest} ")
        elif not line.startswith("."):
            lines.append(f"{line} ")
    yield Page(file.name.removesuffix(".gz"), "".join(lines), named)


def entries(file: Path) -> Iterator[Page]:
    """The entries of a dictionary of dictd: a headword begins at the margin after a blank line."""
    for part in re.split(r"\n\s*\n(?=\S)", unzipped(file)):
        head, _, rest = part.partition("\n")
        yield Page(head.strip(), f"{head.strip()}\n\n{re.sub(r'[{}]', '', rest)}")


PSF, GPL = "PSF-2.0", "GPL-2.0-or-later"
SOURCES: tuple[tuple[Source, ...], ...] = (  # each line gives one share of the pages
    (Source("manpages", "usr/share/man/man7/*.gz", roff, ""),),
    (Source("manpages-dev", "usr/share/man/man[23]/*.gz", roff, ""),),
    (Source("python3.13-doc", "usr/share/doc/python3.13/html/[hlft][oiau][wbqt]*/*.html", html, PSF),),
    (Source("postgresql-doc-17", "usr/share/doc/postgresql-doc-17/html/*.html", html, "PostgreSQL"),),
    (Source("sqlite3-doc", "usr/share/doc/sqlite3/*.html", html, "public domain"),),
    (
        Source("debian-policy", "usr/share/doc/debian-policy/policy.html/*.html", html, GPL),
        Source("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html", html, f"{GPL} or CC-BY-SA-3.0"),
    ),
    (Source("git-doc", "usr/share/doc/git-doc/*.html", html, "GPL-2.0-only"),),
    (
        Source("dict-foldoc", "usr/share/dictd/foldoc.dict.dz", entries, "GFDL-1.1-or-later"),
        Source("dict-jargon", "usr/share/dictd/jargon.dict.dz", entries, "public domain"),
    ),
)


def fetch(folder: Path) -> None:
    """Download and unpack the packages that ``folder`` lacks."""
    for source in (source for share in SOURCES for source in share):
        place = folder / source.package
        if not place.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", "-q", source.package], cwd=folder, check=True)
            (archive,) = folder.glob(f"{source.package}_*.deb")
            subprocess.run(["dpkg-deb", "-x", archive, place], check=True)


def version(folder: Path, package: str) -> str:
    archives = [*folder.glob(f"{package}_*.deb")]
    return archives[0].name.split("_")[1].replace("%3a", ":") if archives else "?"


def tidy(text: str) -> str:
    """Without spaces at the ends of lines, and with at most one blank line."""
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", re.sub(r" *\n *", "\n", text)).strip() + "\n"


def without_navigation(pages: list[Page]) -> Iterator[Page]:
    """Without the paragraphs, such as links and common headings, that more than a tenth of the pages share."""
    split = [page.text.split("\n\n") for page in pages]
    counts = Counter(part.strip() for parts in split for part in set(parts))
    most = max(2, len(pages) // 10)
    for page, parts in zip(pages, split, strict=True):
        yield page._replace(text="\n\n".join(part for part in parts if counts[part.strip()] <= most))


def pages(folder: Path, share: tuple[Source, ...]) -> Iterator[tuple[Source, Page]]:
    """The pages of one share with a length within `LENGTHS`, in the order of the hashes of their names."""
    hashed = []
    for source in share:
        files = sorted((folder / source.package).glob(source.files))
        read = [page._replace(text=tidy(page.text)) for file in files for page in source.pages(file)]
        for page in without_navigation([page for page in read if page.licence or source.licence]):
            if len(page.text) in LENGTHS:
                digest = hashlib.sha256(f"{source.package}/{page.name}".encode()).hexdigest()
                hashed.append((digest, source, page))
    for _, source, page in sorted(hashed, key=lambda item: item[0]):
        yield source, page


def collect(packages: Path, folder: Path, each: int, skip: int) -> int:
    """Write the pages and their list. Returns the number of pages. ``skip``: pages of each source that come first."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, seen = ["file\tpackage\tversion\tpage\tlicence\tsha256\n"], set()
    for share in SOURCES:
        count = 0
        for source, page in pages(packages, share):
            if count == skip + each:
                break
            digest = hashlib.sha256(page.text.encode()).hexdigest()
            if digest in seen:
                continue
            seen.add(digest)
            count += 1
            if count <= skip:
                continue
            name = f"{source.package}-{re.sub(r'[^A-Za-z0-9.-]+', '_', page.name)}.txt"
            (folder / name).write_text(page.text, encoding="utf-8")
            licence = page.licence or source.licence
            row = (name, source.package, version(packages, source.package), page.name, licence, digest)
            rows.append("\t".join(row) + "\n")
        print(f"{count - skip:4} {' + '.join(source.package for source in share)}", file=sys.stderr)
    (folder / LIST).write_text("".join(rows), encoding="utf-8")
    return len(rows) - 1


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--packages", type=Path, default=Path("/tmp/calmclip-packages"))
    options.add_argument("--each", type=int, default=25)
    options.add_argument("--skip", type=int, default=0)
    args = options.parse_args()
    fetch(args.packages)
    print(f"{collect(args.packages, args.folder, args.each, args.skip)} pages in {args.folder}")
