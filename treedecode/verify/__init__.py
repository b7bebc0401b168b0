"""Judging what was decoded: equivalence of answers, and scores of live branches."""
