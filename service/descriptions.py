"""What the properties and parameters of /openapi.json mean, where their own model says nothing.

A name that means the same in many models is described here once. `describe` adds the descriptions;
tests/service/test_openapi.py walks the specification and fails for a property or a parameter without one.
"""

import re
from typing import Any

# A property, or MODEL.PROPERTY where the name alone could mean something else.
PROPERTIES = {
    "backend": "what runs the graph, as Triton names it",
    "background": "labels that take the pixels of no other label",
    "binary_data_size": "bytes of the tensor's data after the JSON",
    "batch_size": "rows of a run",
    "batch_stats": "the same by the number of rows",
    "box": "where it is, in pixels of the upright picture",
    "boxes": "x0, y0, x1, y1 of each, in pixels of the upright picture",
    "caption": "a sentence about the picture",
    "classifiers": "ordered by name",
    "collection": "its name",
    "collections": "ordered by name",
    "compute_infer": "per run: the graph",
    "compute_input": "per run: joins the rows of several calls",
    "compute_output": "per run: parts the rows",
    "count": "how many",
    "created": "when it was created: UTC, ISO 8601",
    "data": "the elements, in rows of equal length or flat, in row-major order",
    "datatype": "of its elements, as the Open Inference Protocol names it, such as FP32",
    "default_model_filename": "the graph's file in the bundle",
    "descriptions": "label -> sentences that stand for it instead of the templates",
    "detail": "what is wrong, what was expected, and what to do",
    "dim": "length of the vectors",
    "examples": "pictures of objects to find",
    "fail": "calls that failed",
    "id": "as the caller chose it",
    "ids": "of the items to remove; ids that do not exist are ignored",
    "image": "a picture",
    "images": "pictures",
    "index": "position in the request, from 0",
    "inference_stats": "counts and times of all its calls",
    "input": "what the graph reads",
    "inputs": "what the graph reads",
    "instance_group": "what runs beside each other",
    "instance": "the path of the request",
    "items": "the items",
    "kind": "of processor",
    "kept": "number of boxes after suppression",
    "label": "as the request, the classifier or the bundle has it",
    "labels": "names of what a picture may show",
    "live": "true while the process answers",
    "loaded": "the names of the loaded bundles",
    "max_queue_delay_microseconds": "how long a call waits for calls of other requests",
    "meta": "the item's metadata, as it was given",
    "method": "its name",
    "model_stats": "one for each graph",
    "model": "the bundle that answered",
    "name": "its name",
    "none_below": "if every score is below it, the answer is none of these; null: never",
    "normalized": "whether they are unit vectors",
    "ns": "nanoseconds in all",
    "object": "what the object is, as OpenAI's API names it",
    "output": "what the graph answers",
    "outputs": "what the graph answers",
    "owned_by": "always `calmclip`",
    "parameters": "of the Open Inference Protocol",
    "platform": "what runs the graph",
    "precision": "of its graphs: int8, mixed or float",
    "preferred_batch_size": "rows of a run, at most",
    "probability": "0 to 1",
    "query": "what to search for",
    "ready": "whether requests can be answered",
    "request_id": "as in the header X-Request-Id; the log has it too",
    "score": "higher is better",
    "shape": "number of elements in each dimension",
    "state": "whether it can be run",
    "status": "of the HTTP answer",
    "suppression": "the settings of soft-NMS that were used",
    "tasks": "what it can be asked for",
    "templates": "sentences with a {} for the label",
    "text": "a text",
    "texts": "the texts",
    "threshold": "the least score of a pixel of a label",
    "title": "the kind of problem, in words",
    "top_k": "the number of hits; at most CALMCLIP_LIMITS__TOP_K",
    "total_tokens": "as `prompt_tokens`",
    "type": "the kind of problem: an address below /problems, which explains it",
    "usage": "what the request took",
    "version": "of the service",
    "versions": "of the model; there is one",
    "word": "of the vocabulary",
    "x0": "left",
    "x1": "right",
    "y0": "top",
    "y1": "bottom",
    "height": "in pixels",
    "width": "in pixels",
    "extensions": "of the protocol, that the service has",
    "AnomalyAnswer.image": "size of the upright picture",
    "BankAnswer.items": "number of items",
    "CollectionAnswer.items": "number of items",
    "CalibrateBody.items": "pictures with their labels",
    "DetectAnswer.image": "size of the upright picture",
    "EmbeddingsBody.input": "a text or a list of texts; a data URI of a picture stands for that picture",
    "EmbedBody.inputs": "texts, pictures, or vectors in place of texts; the answer has their order",
    "FitBody.items": "pictures with their labels; or name a collection",
    "FitReportAnswer.labels": "number of labels",
    "HealthAnswer.status": "always `ok`",
    "InferAnswer.id": "of the request",
    "InferAnswer.model_name": "BUNDLE.GRAPH, as in the path",
    "ModelAnswer.digest": "sha256 of bundle.json",
    "ModelSummary.dim": "length of its vectors; null: it does not embed",
    "SegmentAnswer.image": "size of the upright picture",
}
# The segment of a path before a parameter -> what the parameter is.
PARAMETERS = {
    "classifiers": "the classifier's name",
    "collections": "the collection's name",
    "models": "the bundle's name; under /v2 BUNDLE.GRAPH, such as mini-int8.image",
    "problems": "the last part of a problem's `type`",
}


def describe(specification: dict[str, Any]) -> None:
    """Add the descriptions, in place. Those that a model or a route has stay."""
    for model, schema in specification["components"]["schemas"].items():
        _describe(schema, model)
    for path, operations in specification["paths"].items():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                before = re.search(rf"(\w+)/\{{{parameter['name']}}}", path)
                if before and before[1] in PARAMETERS:
                    parameter.setdefault("description", PARAMETERS[before[1]])
            for content in operation.get("requestBody", {}).get("content", {}).values():
                _describe(content["schema"], "")


def _describe(schema: dict[str, Any], model: str) -> None:
    for name, field in schema.get("properties", {}).items():
        text = PROPERTIES.get(f"{model}.{name}") or PROPERTIES.get(name)
        if text and "description" not in field:
            field["description"] = text
