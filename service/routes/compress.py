"""POST /v1/compress: texts -> their sentences that stay near the vector of the whole, within a budget of tokens."""

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.preprocess.truncation import Truncation
from calmclip.models.tasks.compress import CompressRequest, compress
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENGINE, INPUT, Endpoint
from calmclip.service.routes import check_characters, check_count, task_route
from calmclip.service.schemas.compress import CompressAnswer, CompressBody


@task_route(
    Endpoint(
        "POST",
        "/v1/compress",
        task="compress",
        scope="read",
        summary="Texts, shortened to a budget of tokens",
        description="Whole sentences are kept, in their order. No answer has more tokens than the budget.",
        body=CompressBody,
        example={
            "texts": ["A cat sleeps on a sofa. It is grey. Nobody knows how it came into the house."],
            "budget": 12,
        },
        answer=CompressAnswer,
        problems=(*ENGINE, *INPUT, "text-too-long"),
    ),
    compress,
    CompressAnswer.of,
)
def compress_texts(asked: Asked[CompressBody], bundle: Bundle) -> CompressRequest:
    check_count(asked, len(asked.body.texts), "texts")
    check_characters(asked, bundle, asked.body.texts, Truncation("compress"))
    return CompressRequest(asked.body.texts, asked.body.budget)
