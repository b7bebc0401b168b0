"""The accuracy-compute study: what each strategy buys, for how much, and the laws that fit it."""
