"""Reuse at any position: chunks that return elsewhere, repaired where they drifted.

Knows tokens, chunks and one layer of a model at a time; no requests, no scheduler, no cache. The
engine imports this package, never the other way round.
"""
