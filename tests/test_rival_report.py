"""The tables of `tests.bench.rivals`, on invented figures whose results are worked out by hand."""

import pytest

from tests.bench import rival_report

TOWER = {
    "key": "b32",
    "title": "CLIP ViT-B/32 image",
    "note": "",
    "library": "transformers",
    "macs": 4_000_000_000,
    "peak": 200e9,  # the bound is 20 ms
    "machine": "a machine",
    "versions": {"openvino": "1"},
    "refused": {"faster-clip": "not installed", "torch bf16, timm": "no module", "torch float, timm": "no module"},
    "engines": {
        "calmclip INT8": {"ms": {"1x1": 25.0, "2x8": 10.0}, "cosine": 0.995, "memory_mb": 120.4},
        "OpenVINO INT8": {"ms": {"1x1": 30.0, "2x8": 12.0}, "cosine": 0.99, "memory_mb": 270.0},
        "OpenVINO INT8, bf16 rest": {"ms": {"1x1": 15.0, "2x8": 6.0}, "cosine": 0.98, "memory_mb": 270.0},
        "torch float, transformers": {"ms": {"1x1": 150.0}, "cosine": 1.0, "memory_mb": 500.0},
        "calmclip INT8, AVX2": {"ms": {"1x1": 20.0}, "cosine": 0.995, "memory_mb": 120.4},
        "OpenVINO INT8, AVX2": {"ms": {"1x1": 28.0}, "cosine": 0.99, "memory_mb": 270.0},
    },
}  # fmt: skip


def cells(text: str, first: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_a_rival_too_far_from_float_is_shown_and_does_not_count():
    table = rival_report.table(TOWER)
    # the best rival that counts takes 30 ms and 12 ms, ours 25 ms and 10 ms; 20 / 25 of the bound
    assert cells(table, "**calmclip INT8**") == ["25.0 (1.20x)", "10.0 (1.20x)", "80%", "0.9950", "120"]
    assert cells(table, "OpenVINO INT8, bf16 rest")[3] == "0.9800 (too far to count)"
    assert cells(table, "torch float, transformers")[:2] == ["150 (0.20x)", "-"]


def test_engines_without_avx512_are_compared_with_one_another():
    """Their figures, here the lowest, change no other row."""
    table = rival_report.table(TOWER)
    assert cells(table, "**calmclip INT8, AVX2**")[0] == "20.0 (1.40x)"
    assert cells(table, "OpenVINO INT8, AVX2")[0] == "28.0 (1.00x)"
    assert cells(table, "OpenVINO INT8")[0] == "30.0 (1.00x)"


def test_an_engine_that_did_not_run_is_listed_with_its_reason():
    table = rival_report.table(TOWER)
    assert "Not measured: faster-clip (not installed); torch bf16, timm, torch float, timm (no module)." in table


def test_the_summary_says_how_many_times_faster_calmclip_is():
    # OpenVINO's faster variant is too far from float; 30 / 25, 150 / 25
    assert cells(rival_report.summary([TOWER]), TOWER["title"]) == [
        "**25.0**", "30.0 (1.20x)", "-", "-", "-", "150 (6.00x)", "20.0, 28.0 (1.40x)", "80%", "0.9950",
    ]  # fmt: skip


def test_the_section_names_the_machine_and_versions_of_every_tower():
    """Kept figures may come from other days."""
    later = TOWER | {"key": "b16", "machine": "another machine", "versions": {"openvino": "2"}}
    section = rival_report.section([TOWER, later, TOWER])
    assert "\n* a machine; openvino 1\n* another machine; openvino 2\n" in section


def test_the_summary_says_if_all_variants_of_a_rival_are_too_far():
    far = {**TOWER["engines"], "OpenVINO INT8": {"ms": {"1x1": 30.0}, "cosine": 0.98, "memory_mb": 270.0}}
    # 15 / 25
    columns = cells(rival_report.summary([TOWER | {"engines": far}]), TOWER["title"])
    assert columns[1] == "15.0 (0.60x, too far to count)"


def test_without_a_peak_the_column_of_the_bound_says_unknown():
    assert cells(rival_report.summary([TOWER | {"peak": None}]), TOWER["title"])[-2] == "unknown"


def test_only_the_text_between_the_marks_of_a_page_changes():
    page = f"before\n{rival_report.START}\nold\n{rival_report.END}\nafter\n"
    once = rival_report.placed(page, "new\n")
    assert once == f"before\n{rival_report.START}\n\nnew\n\n{rival_report.END}\nafter\n"
    assert rival_report.placed(once, "new\n") == once
    with pytest.raises(ValueError, match="put both marks"):
        rival_report.placed("no marks", "new")
