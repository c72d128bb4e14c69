"""Thin scripts that are submitted to a cluster."""
