"""The gate: what a few probes of a problem say about how much more compute it is worth."""
