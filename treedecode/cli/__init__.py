"""The commands of `treedecode`, a module each; none imports torch before it runs."""
