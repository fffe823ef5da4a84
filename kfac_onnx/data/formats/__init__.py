"""One module per format: each opens a file as a `Source` of blocks of rows."""
