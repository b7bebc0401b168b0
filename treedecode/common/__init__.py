"""Settings from the environment, and statistics: what every room may use."""
