"""Parts that all runs share: the folder that a run resumes from, its record, its tables and its trainer."""
