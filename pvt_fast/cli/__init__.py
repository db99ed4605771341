"""The command `pvt-fast`. Imported before everything else, for `interrupt`: so nothing is imported here."""
