"""The command line: commands parse, call and print; what they do lives in the other rooms."""
