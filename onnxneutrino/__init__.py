"""Make an ONNX model smaller and faster, its metric at most delta worse."""
