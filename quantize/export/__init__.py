"""Formats of other engines: GGUF for llama.cpp, ONNX for encoders."""
