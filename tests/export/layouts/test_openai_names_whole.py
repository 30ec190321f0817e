"""Some layouts from a file to a sealed bundle that `calmclip check` finds whole, and its INT8 beside its float."""

from collections.abc import Callable
from pathlib import Path

import pytest

from models.bundle.store import read
from models.cli import main
from tests.tiny_layouts import openai_like


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "flags"),
    [
        (openai_like.openai_resnet, []),
        (openai_like.slip, []),
        (openai_like.grain, []),
        (openai_like.long_clip, ["--activation", "quick_gelu"]),
        (openai_like.clip_moe, []),
        (openai_like.clip_moe, ["--experts", "routed"]),
    ],
)
def test_one_command_from_a_file_to_a_bundle_that_checks(write: Callable, flags: list[str], tmp_path: Path, capsys):
    # random towers keep no accuracy bar worth the name; the walk is what is under test
    bars = 'name = "whole"\n[bars]\nmin_image_cosine = 0.9\nmin_text_cosine = 0.9\n'
    (tmp_path / "recipe.toml").write_text(bars)
    out = ["--out", str(tmp_path / "out"), "--recipe", str(tmp_path / "recipe.toml")]
    assert main(["export", str(write(tmp_path / "checkpoint")), *out, *flags]) == 0
    assert main(["check", "whole-int8", "--bundles", str(tmp_path / "out")]) == 0
    assert "layout " in read(tmp_path / "out" / "whole-int8", verify=True).manifest.source.notes
