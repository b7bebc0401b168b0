"""vLLM plugin: attention that reads a shared prefix once, on vLLM's own cache.

vLLM loads `register` in all of its processes, by the entry point `vllm.general_plugins`.
"""

from treedecode.integrations.vllm.plugin import register as register
