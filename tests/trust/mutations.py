"""Ways to damage a model: functions of a random source and a model, by the level at which they cut.

Each takes `(random, bytes or ModelProto)` and changes it; what it did is its name. `mutate_bytes` knows nothing of
ONNX, `mutate_graph` and `mutate_tensors` leave a file that a protobuf parser reads, `mutate_metadata` breaks what the
`kfac.*` entries say, and what users type.
"""

from mutate_bytes import damaged_bytes
from mutate_graph import GRAPH
from mutate_metadata import METADATA, damaged_text
from mutate_tensors import TENSOR

__all__ = ["GRAPH", "METADATA", "TENSOR", "damaged_bytes", "damaged_text"]
