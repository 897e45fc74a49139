"""What the chapters share: the figure style, drawings, live widgets, and heads to load.

A chapter has to fit into about one gigabyte on Binder, and most of that goes into compilation.
XLA's newer code generator for CPUs takes about 0.3 GB more than the older one for a chapter that
trains a head, and buys no speed there. Importing the kit, before anything is computed, chooses
the older one. An unknown flag would end the process, so that the choice is made only for the
versions of jaxlib that are known to have it.

Where a process may use a single core, as on Binder, XLA 0.9 makes a pool of one thread, and a
batched factorisation that waits in it for its own parts waits for ever. A pool of two does not
hang, and costs nothing. It is made before the first computation, and its size is read from NPROC.
"""

import importlib.metadata
import os

_FLAG = "--xla_cpu_use_fusion_emitters"

if importlib.metadata.version("jaxlib").startswith("0.9."):
    _flags = os.environ.get("XLA_FLAGS", "")
    if _FLAG not in _flags:
        os.environ["XLA_FLAGS"] = f"{_flags} {_FLAG}=false".strip()

_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
if _cores == 1:
    os.environ.setdefault("NPROC", "2")
