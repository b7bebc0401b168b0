"""Runs treedecode inside other libraries."""
