"""Diagnostics: did variational inference work here, and where not? Each returns xarray data, which ``plots`` draws."""
