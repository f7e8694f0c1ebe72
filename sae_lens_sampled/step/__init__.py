"""One training step as functions of tensors: scores, pools, scan, kept entries, thresholds; all without SAELens."""
