"""Trains and evaluates a gate: rollouts, fit, comparison with the oracle and with uniform allocation, audit."""
