"""The workers as Ray actors that come and go; nothing else in the pipeline knows Ray."""
