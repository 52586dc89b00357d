"""The mathematics of Arcee's decoder; nothing in this folder reads or writes a file except `config.read_config`."""
