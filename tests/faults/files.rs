//! Files and directories that are full, read-only, gone, or replaced.
