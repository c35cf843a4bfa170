"""The reference engine: a readable Llama-family decoder in plain PyTorch.

It knows no cache. What wants to fill or read its paged KV pool implements `hook.KvHook`.
"""
