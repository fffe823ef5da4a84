"""Reader of graphs that contain their optimizer: an output is the new value of a parameter.

The update is found by data flow (see `spine` and `direction`) and taken out: what is left is the loss, the
parameters and their gradients. Names of inputs and outputs settle what data flow leaves open; names of
inner values never do.
"""

from kfac_onnx.readers.optimizer_inside.gradient_scale import calibrate, scaled
from kfac_onnx.readers.optimizer_inside.reader import optimizer_inside

__all__ = ["calibrate", "optimizer_inside", "scaled"]
