//! Messages and requests of those who mean no good: floods, stalls, halves.
