"""CycleQD in JAX: breed language models by quality-diversity search.

The rooms, bottom up: ``merging`` (algebra of task vectors), ``qd`` (archives, selection, emitters),
``models`` (Llama weights as pytrees), ``training``, ``sandbox`` and ``tasks`` (model-written
programs run and judged), ``runs`` (one run from start to finish). Importing the package does no
work.
"""

__version__ = "0.1.0"
