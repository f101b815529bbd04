"""Whether where a fact is traced to says where to edit it (Hase et al., 2023)."""
