"""What a pass is, its options, its text, and how several run in order."""
