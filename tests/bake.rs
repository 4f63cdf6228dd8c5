//! Bakes: the old generation stands by, gets nothing, and is back at once when the new one fails.
