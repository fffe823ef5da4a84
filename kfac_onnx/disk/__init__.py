"""Everything that touches a file: models, external data, arrays, records, the gate that files pass."""
