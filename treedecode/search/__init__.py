"""Search works on one problem for a strategy; solve runs a strategy on many problems."""
