"""What the chapters share: the figure style, drawings, live widgets, and heads to load.

A chapter has to fit into about one gigabyte on Binder, and two thirds of its time goes into
compilation. XLA's newer code generator for CPUs takes about 0.3 GB more than the older one for a
chapter that trains a head, and buys no speed there. Of LLVM's optimisation levels the second takes
about half of the compilation time of the third, which XLA asks for, and its programs take a tenth
to a third longer: a chapter wins by it. Importing the kit, before anything is computed, chooses the
older generator and the second level. An unknown flag would end the process, so that the choice is
made only for the versions of jaxlib that are known to have both.

Where a process may use a single core, as on Binder, XLA 0.9 makes a pool of one thread, and a
batched factorisation that waits in it for its own parts waits for ever. A pool of two does not
hang, and costs nothing. It is made before the first computation, and its size is read from NPROC.
"""

import importlib.metadata
import os

_FLAGS = {"--xla_cpu_use_fusion_emitters": "false", "--xla_backend_optimization_level": "2"}

if importlib.metadata.version("jaxlib").startswith("0.9."):
    _given = os.environ.get("XLA_FLAGS", "")
    _chosen = [f"{flag}={value}" for flag, value in _FLAGS.items() if flag not in _given]
    os.environ["XLA_FLAGS"] = " ".join([_given, *_chosen]).strip()

_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
if _cores == 1:
    os.environ.setdefault("NPROC", "2")
