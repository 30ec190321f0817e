"""POST /v1/segment: picture + labels -> a mask for each label, as run lengths or PNG."""

from functools import partial

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Flow, Work
from calmclip.models.labels import check_length
from calmclip.models.tasks.segment import MAX_RUNS, SegmentRequest, Segments, segment
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.openapi import PNG_FILE
from calmclip.service.schemas.segment import SegmentAnswer, SegmentBody


@Endpoint(
    "POST",
    "/v1/segment",
    task="segment",
    scope="read",
    summary="A mask for each label of a picture",
    description=f"Masks are those of the upright picture, of at most {MAX_RUNS} runs in all. With `format` `indexed` "
    "the answer is a PNG file, whose text `labels` is a JSON object: the value of a pixel -> its label.",
    body=SegmentBody,
    example={"image": {"b64": PIXEL}, "labels": ["a cat", "a dog"], "background": ["grass"], "threshold": 0.2},
    answer=SegmentAnswer,
    problems=(
        *ENGINE, *INPUT, *PICTURE,
        "classifier-not-found", "classifier-bundle-mismatch", "too-many-labels", "text-too-long",
    ),
    responses=PNG_FILE,
)  # fmt: skip
async def segment_picture(asked: Asked[SegmentBody]) -> SegmentAnswer | bytes:
    body = asked.body
    loaded = asked.bundle(body.model)
    classifier = asked.parts.classifiers.for_request(body.classifier, body.labels, body.templates)
    for index, word in enumerate(body.background or ()):
        check_length(f"background {index}", word)
    asked.check(body.image)
    request = SegmentRequest(
        body.image,
        body.labels,
        body.templates,
        classifier,
        body.method,
        body.params,
        body.background,
        body.threshold,
        body.independent,
        body.windows(),
    )
    return await asked.run(loaded, _answered(loaded.bundle, request, body, asked.limits.mask_pixels))


def _answered(bundle: Bundle, request: SegmentRequest, body: SegmentBody, most: int) -> Flow[SegmentAnswer | bytes]:
    """Masks become texts and files in a thread of the pool. Raises as `segment`; `BadRequest` for PNGs of more than
    ``most`` pixels."""
    segments = yield from segment(bundle, request)
    if body.format != "rle":
        _check_pixels(segments, most)
    if body.format == "indexed":
        png: bytes = yield Work("postprocess", segments.indexed_png)
        return png
    answer: SegmentAnswer = yield Work("postprocess", partial(SegmentAnswer.of, body, bundle, segments))
    return answer


def _check_pixels(segments: Segments, most: int) -> None:
    count = len(segments.segments)
    if (pixels := segments.width * segments.height * count) > most:
        raise BadRequest(
            f"{count} masks of {segments.width} x {segments.height} pixels have {pixels} pixels; at most {most} are "
            "written into PNGs. Ask for run lengths, send fewer labels, a higher threshold or a smaller picture"
        )
