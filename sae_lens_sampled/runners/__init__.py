"""Everything that touches SAELens' runners, trainers and stores."""
