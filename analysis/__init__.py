"""What finished experiments show: tables, pictures, comparisons, how far back a memory helps.

Reads what `recipes` leaves. Runs no experiment and times nothing.
"""
