"""What a GPU is asked to prove: a module a section, each with ``measure(case, toy, folder)``."""
