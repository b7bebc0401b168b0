"""One problem under way, and runs over many problems."""
