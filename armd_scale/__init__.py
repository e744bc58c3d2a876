"""Auto-Regressive Masked Diffusion language models at scale (arXiv 2601.16971).

Packages, in the order of their dependencies:

- ``errors``, ``files``, ``config``, ``orders``, ``tokenizer`` know nothing of the rest;
- ``model`` builds the network and its loss from Megatron-Core layers;
- ``parallel`` lays processes out and shards the optimiser;
- ``training`` is the loop, its checkpoints and its telemetry;
- ``inference`` is the standalone model and stands alone;
- ``evaluation`` scores it.
"""

import warnings

__version__ = "0.1.0"

# Megatron-Core reports every optional package that is not installed.
warnings.filterwarnings("ignore", module="megatron")
