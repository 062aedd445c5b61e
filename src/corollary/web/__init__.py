"""The daily page: papers by day, search, likeness, digest, and the verdict on every card."""
