"""Branches, and the forwards that move them."""
