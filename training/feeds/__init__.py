"""Feeds of training data: held on the devices, or streamed from the host.

A feed owns its data and the compiled programs that use them, so the loop over epochs treats both
kinds alike.
"""

from typing import TYPE_CHECKING

from input_pipeline.resident import Arrays
from training.feeds.feed import Feed, Stalled
from training.feeds.resident import ResidentFeed
from training.feeds.streamed import StreamedFeed
from training.plan import Plan

if TYPE_CHECKING:
    from input_pipeline.streaming import Sources

__all__ = ["Feed", "Stalled", "make_feed"]


def make_feed(plan: Plan, data: "Arrays | Sources") -> Feed:
    """Puts the data on the devices, or on their way, and builds the programs that use them."""
    return ResidentFeed(plan, data) if isinstance(data, Arrays) else StreamedFeed(plan, data)
