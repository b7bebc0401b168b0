"""Costs of forwards, budgets, ledgers and energy."""
