"""Cross-seed mean max cosine similarity as an eval in SAEBench's form."""
