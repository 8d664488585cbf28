"""What finished experiments show: tables, pictures, comparisons, how far back a memory helps.

Reads what `recipes` leaves. Runs no experiment and times nothing.
"""

import os

# Pictures go to files. A notebook's backend, which this environment may lack, would be refused.
os.environ["MPLBACKEND"] = "agg"
