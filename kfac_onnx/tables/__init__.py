"""How the pass `find-embeddings` recognises embedding tables by data flow.

- `facts`: what can be known of a value without running the graph: constants, zeros, ancestors, shapes;
- `lookups`: forward, from a table through views to the operators that read rows of it;
- `scatters`: backward, from a table's gradient through views to the operators that scatter rows into it;
- `one_hot`: products with one-hot rows, read as lookups and as scatters;
- `masks`: the rows that a scatter drops by their ids;
- `claims`: which rows of the gradient belong to which lookup;
- `matching`: pairs the two and decides what is a site, and why not.
"""
