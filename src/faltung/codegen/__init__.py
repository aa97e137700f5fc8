"""Kernels as text: ``emit`` writes LLVM IR, ``compile`` turns it into objects (cached on disk), ``load`` into callables."""
