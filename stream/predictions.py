"""What a run found, in the jsonl of the field (QVHighlights), which existing evaluators read unchanged. Pure."""

import json
from collections.abc import Sequence
from typing import Any

from stream.session import Step
from stream.types import NS, WINDOW_NS, Kind, Query


class Predictions:
    """Collects one stream's moments and saliency. It grows by a number per query and 2 s: meant for recordings."""

    def __init__(self, stream: str, queries: Sequence[Query]) -> None:
        self.stream = stream
        self._queries = list(queries)
        self._windows: dict[str, list[list[float]]] = {query.id: [] for query in queries}
        self._scores: dict[str, list[float]] = {query.id: [] for query in queries}

    def add(self, step: Step) -> None:
        """Take in what one frame led to. Queries that came later than this object are left out."""
        for event in step.events:
            if event.kind is Kind.CLOSED and event.moment and event.moment.query in self._windows:
                moment = event.moment
                assert moment.end_ns is not None
                self._windows[moment.query].append(
                    [round(moment.start_ns / NS, 3), round(moment.end_ns / NS, 3), round(moment.score, 4)]
                )
        for window, saliencies in step.scores:
            # Clips of 2 s stand side by side: of the windows, those on the grid of 2 s. Where none begins right there
            # (the start of a take, a gap) the clip has what the clip before it had, or nothing.
            clip = window.end_ns // WINDOW_NS - 1
            for saliency in saliencies:
                if (scores := self._scores.get(saliency.query)) is not None and clip >= len(scores):
                    held = scores[-1] if scores else 0.0
                    scores.extend([held] * (clip - len(scores)))
                    scores.append(round(saliency.score, 4))

    def rows(self, qids: Sequence[int | str]) -> list[dict[str, Any]]:
        """One row per query, in the order they were given."""
        return [
            {
                "qid": qid,
                "query": query.text,
                "vid": self.stream,
                "pred_relevant_windows": sorted(self._windows[query.id], key=lambda window: -window[2]),
                "pred_saliency_scores": self._scores[query.id],
            }
            for qid, query in zip(qids, self._queries, strict=True)
        ]


def to_jsonl(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
