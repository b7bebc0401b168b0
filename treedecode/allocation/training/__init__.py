"""Training a gate and judging it: rollouts, fit, comparison with the oracle and with uniform allocation, audit."""
