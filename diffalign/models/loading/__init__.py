"""Base models: folders, Hub ids, single files and open pipelines; what encodes and decodes for them."""
