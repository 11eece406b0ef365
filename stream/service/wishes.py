"""What a config asks for, as the service takes it: queries that run anyway, and webhooks."""

from collections.abc import Sequence

from stream.config.schema import Config, WebhookConfig
from stream.deliver.interest import ANY, Interest
from stream.deliver.log import EventLog
from stream.deliver.webhook import Webhook, wants
from stream.types import Query, normalise

Wish = tuple[str, Query]
"""A stream or ANY, and a query that runs on it whether a client wants it or not."""


def queries_of(config: Config, interest: Interest) -> list[Wish]:
    """
    Raises:
        InputError: the engine cannot take one.
    """
    streams = [(ANY, config.queries), *((name, stream.queries) for name, stream in config.streams.items())]
    return [(stream, interest.encode(each.text, each.threshold)) for stream, queries in streams for each in queries]


def hold(interest: Interest, wishes: Sequence[Wish]) -> list[tuple[str, str]]:
    """See to it that they run; what is to be released once they need not."""
    for stream, query in wishes:
        interest.hold(stream, query)
    return [(stream, query.id) for stream, query in wishes]


def webhooks_of(config: Config, interest: Interest, wishes: Sequence[Wish], log: EventLog) -> list[Webhook]:
    """
    Raises:
        InputError: the engine cannot take one of their queries.
    """
    return [_webhook(each, interest, [query for _, query in wishes], log) for each in config.webhooks]


def _webhook(config: WebhookConfig, interest: Interest, queries: Sequence[Query], log: EventLog) -> Webhook:
    ids = None
    if config.queries is not None:
        ids = {interest.encode(text, None).id for text in config.queries}
        texts = {normalise(text) for text in config.queries}
        ids |= {query.id for query in queries if normalise(query.text) in texts}  # those with thresholds, too
    return Webhook(log, config.url, secret=config.secret, wanted=wants(config.kinds, config.streams, ids))
