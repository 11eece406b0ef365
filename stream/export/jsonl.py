"""Moments in the jsonl of the field (QVHighlights), a row a query.

Scores of clips are in no log: that list, which evaluators ask for, stays empty.
"""

from collections.abc import Sequence

from stream.events import rfc3339
from stream.export.moments import ClosedMoment, origin_ns
from stream.predictions import to_jsonl
from stream.types import NS


def to_rows(stream: str, moments: Sequence[ClosedMoment]) -> str:
    """Windows in s, best first. `origin` says in UTC from when they count; queries come as they were first found."""
    origin = origin_ns(moments)
    found: dict[str, list[ClosedMoment]] = {}
    for moment in moments:
        found.setdefault(str(moment.told["query_id"]), []).append(moment)
    return to_jsonl(
        [
            {
                "qid": qid,
                "query": of_query[0].query,
                "vid": stream,
                "origin": rfc3339(origin),
                "pred_relevant_windows": sorted(
                    (
                        [
                            round((moment.start_ns - origin) / NS, 3),
                            round((moment.end_ns - origin) / NS, 3),
                            round(moment.score, 4),
                        ]
                        for moment in of_query
                    ),
                    key=lambda window: -window[2],
                ),
                "pred_saliency_scores": [],
            }
            for qid, of_query in enumerate(found.values(), 1)
        ]
    )
