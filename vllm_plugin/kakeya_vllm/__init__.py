"""KAKEYA: a compressed KV cache for vLLM.

The package translates between vLLM and libkakeya. vLLM finds it through the entry point
``vllm.general_plugins`` (``kakeya_vllm.register:register``); nothing else has to be imported.
The life of a token here: ``register`` -> ``patches`` -> ``backend`` -> ``impl`` -> ``lib``.

Importing the package is free: everything heavy is imported by the module that needs it.
"""

__version__ = "0.1.0"
