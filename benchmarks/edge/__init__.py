"""Edge formats: GGUF by llama.cpp, encoders by onnxruntime."""
