"""One run from start to finish: folder, driver, checkpoints, logs, lineage, report, export.

Imports nothing by itself: the modules are used by name, so that reading a log never loads Orbax.
"""
