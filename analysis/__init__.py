"""What finished experiments show: tables, pictures, comparisons, how far back a memory helps.

Reads what recipes leave; runs no experiment and times nothing.
"""
