"""Data sets: expressions, pictures and manifests; a reader for each set; copies between sets; alignment of photographs."""
