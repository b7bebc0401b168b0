"""Modules that every room may use: settings from the environment, checks of arguments, statistics."""
