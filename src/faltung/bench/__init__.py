"""Benchmarks: suites of layers, contenders, checked and interleaved timing, CSV rows and the report made from them.

The command is ``faltung bench``; nothing of the rest of the package imports this one.
"""
