"""Merging changes no answer: rows of real bundles in single runs and in merged runs of the batcher."""

import asyncio

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.store import read
from calmclip.models.runtime.session import Session, SessionOptions
from calmclip.service.batching import Batcher

ROWS = 7


def feeds_of(bundle: Bundle, role: str) -> dict[str, np.ndarray]:
    """`ROWS` different rows, like those of requests."""
    if role == "text":
        return dict(bundle.text().prepare([f"a photo of {thing}" for thing in "abcdefg"]))
    ((name, tensor),) = bundle.graph(role).inputs.items()
    shape = (ROWS, *(int(side) for side in tensor.shape[1:]))
    return {name: np.random.default_rng(7).standard_normal(shape).astype(np.float32)}


def answered(session: Session, feeds: dict[str, np.ndarray], *, together: bool) -> list[bytes | np.ndarray]:
    """The answer of each row, from one merged run or from a run per row, through the batcher."""
    sizes = []

    async def main():
        batcher = Batcher(
            session.run,
            max_size=ROWS if together else 1,
            max_wait_s=5.0,
            concurrent=lambda: together,
            observe=lambda rows, _: sizes.append(rows),
        )
        calls = [{name: array[i : i + 1] for name, array in feeds.items()} for i in range(ROWS)]
        answers = await asyncio.gather(*map(batcher.run, calls))
        await batcher.close()
        return [next(iter(answer.outputs.values())) for answer in answers]

    answers = asyncio.run(main())
    assert sizes == ([ROWS] if together else [1] * ROWS)
    return answers


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("role", ["image", "text"])
@pytest.mark.parametrize("name", ["tiny-int8", "tiny-float"])
def test_a_row_has_the_same_answer_in_a_single_and_a_merged_run(tiny_bundles, name, role, threads):
    """INT8 to the bit; float to 1e-6, because a single row's products may be summed in another order."""
    bundle = Bundle(read(tiny_bundles / name))
    graph = bundle.graph(role)
    session = Session(bundle.directory / graph.file, graph, SessionOptions(threads=threads))
    feeds = feeds_of(bundle, role)
    single, merged = (np.concatenate(answered(session, feeds, together=together)) for together in (False, True))
    assert len(np.unique(single, axis=0)) == ROWS
    if name.endswith("int8"):
        assert single.tobytes() == merged.tobytes()
    else:
        assert np.abs(single - merged).max() <= 1e-6
