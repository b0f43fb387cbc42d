"""Benchmarks: fair, named baselines and the commands that repeat every number in the documentation.

Every module right here is a command. What they are made of, each folder importing only from those before it: ``baselines``,
whose steps ours are compared with; ``measuring``, what a step takes and the files that say so; ``gpu``, the parts of
``gpu_report``. ``results`` holds what was measured, NOTES.md what was tried and decided.
"""
