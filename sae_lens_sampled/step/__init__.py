"""One training step on tensors alone: scores, pools, the scan, kept entries, thresholds. Imports no SAELens."""
