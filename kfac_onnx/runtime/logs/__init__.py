"""Where the numbers of a run go: files, TensorBoard, MLflow, Weights & Biases, a function."""
