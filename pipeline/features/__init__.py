"""Frozen features: what a store is, the store itself and that it is whole, the extraction that fills it and its worker."""
