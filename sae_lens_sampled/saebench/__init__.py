"""SAEBench, and what it lacks, for SAEs of any SAELens architecture."""
