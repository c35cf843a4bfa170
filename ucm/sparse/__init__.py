"""Sparse attention of decode steps: which blocks are read, from their summaries.

Knows summaries, queries and pool blocks; no requests, no scheduler, no cache. The engine imports
this package, never the other way round.
"""
