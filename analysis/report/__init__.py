"""The report of one run: a verdict, a table, pictures and continuations, on one page.

Reads metrics and rows of plots, whether a run of this project or a kept experiment left them.
"""
