"""Work that survives a kill: the lock of an output, and the folder of what is finished."""
