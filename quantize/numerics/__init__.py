"""Exact quantizers: what codes stand for, over what a scale spans, how ranges are found. Imports no torch."""
