"""What `generate` asks of an offloaded model: its compiled call, a static KV cache, a long prompt in pieces."""
