"""How pairs are stored: files, folders, archives and data sets, and the columns they have."""
