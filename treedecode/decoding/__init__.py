"""The Decoder and the Frontier: what a caller decodes with."""
