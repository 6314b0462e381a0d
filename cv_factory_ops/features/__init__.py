"""Vectors with metadata, kept and searched: stores, and what retrieves from them."""
