"""Files and data sets -> rows: formats, messages, mixtures, streams."""
