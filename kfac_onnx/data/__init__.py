"""Training data as people have them: one reader per format, rows in a stated order, vocabularies of ids."""
