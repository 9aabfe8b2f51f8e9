"""From what ranks report to the Plan of the next round. Imports no torch."""
