"""treedecode: decode a whole search tree for about the price of one chain."""

__version__ = "0.1.0"
