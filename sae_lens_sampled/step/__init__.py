"""One training step as functions of tensors: scores, pools, scan, kept entries, thresholds. Imports no SAELens."""
