"""CuMo in vLLM: the plugin that vLLM loads, and the model class on vLLM's transformers backend."""
