"""The science of facial-expression recognition that generalises; nothing here knows Ray, Zarr, MLflow or click.

In the order in which a face passes through, which is also the order to read it in:

data       expressions, pictures and manifests; a reader for each data set; copies between sets; alignment of photographs
towers     frozen towers: their names, weights and layers, and a tower at work on the faces of a manifest
learning   views, batches, the training loops and the trainable image branches
methods    CAFE, its rivals and its baselines, a file each
results    predictions, and every number computed from them: scores, comparisons, tests, protocols, published numbers
report     tables, charts, figures and pages
synthetic  drawn faces in five domains, for whoever has no data set
"""
