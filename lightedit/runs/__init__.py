"""What every long run has: a folder that it can go on from, tables, a record of how it was made."""
