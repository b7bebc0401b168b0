"""Learned compute allocation: a gate predicts what more compute is worth to a problem, allocators divide a budget."""
