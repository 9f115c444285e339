"""The ``vllm`` source: layers timed inside a real vLLM engine with dummy weights."""
