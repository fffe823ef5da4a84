"""What a graph is made of: values, constants, shapes, operators, and how nodes are added and checked."""
